"""Facts of an adapter folder, read without a model: its settings, modules and tensors.

A malformed part is collected as a reason, and never raises an error. The strict readers (peft_adapter.py) raise the first
reason. Shapes come from headers of bounded size. Values are read on demand, one tensor at a time.
"""

from __future__ import annotations

import importlib
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismt.base.errors import UserError, shown_value
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.peft_layouts import added, names_stack, stock_path
from vismt.lowrank.files.peft_settings import PEFT_CONFIG, PeftSettings, texts, typed_settings
from vismt.lowrank.tensors import FLOATING
from vismt.lowrank.update import Update
from vismt.storage.files import DTYPES, JsonObject, read_json
from vismt.storage.paths import regular_file

TENSORS, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
LEGACY_TENSORS = "adapter_model.bin"
LEGACY = (".bin", ".pt", ".pth")
LARGEST_HEADER = 2**24  # bytes, also the limit of a JSON file (100,000 tensors have a header of this size)
REOPENED = 2**28  # bytes read through one memory map (mapped bytes count as memory of the process)
COMPUTED = {*DTYPES.values(), "C64"}
WHOLE = ("saved", "stock", "shared", "tokens")  # roles of tensors that belong to no single adapted module
UPDATES = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}  # roles of tensors that make an update


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    dtype: Name of the type in safetensors, "BF16". path: Path of the tensor's module in the model. A saved parameter has its
    own name there. role: A, B, C (a core), A0, B0 (a start that is subtracted), embedding_A, embedding_B, magnitude, bias (of
    B), saved (a whole parameter), tuner (of peft's other tuners), shared (by several modules), stock, other. adapter: Name of
    the adapter inside `name`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    path: str = ""
    role: str = ""
    adapter: str = ""


@dataclass
class StoredTensors:
    """Tensors by name, of one file or of several files.

    reasons: Reasons why files or values cannot be read. twice: Names that are in two files. The later file counts. made:
    Functions that return weights that are made of several tensors.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    twice: set[str] = field(default_factory=set)
    made: dict[str, Callable[[], Tensor | None]] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)
    _open: Any = None
    _read: int = 0

    def add(self, path: Path, read: Callable[[Path], dict[str, Tensor]] | None = None) -> None:
        """Add the tensors of a file.

        read: Reader of a .bin file that peft did not write.
        """
        try:
            if path.suffix in LEGACY:
                held = (read or read_legacy)(path)
                self._held |= held
                for name, value in held.items():
                    dtype = str(value.dtype)
                    self.tensors[name] = Stored(name, tuple(value.shape), DTYPES.get(dtype, dtype), path)
                return
            with regular_file(path).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
            if size > LARGEST_HEADER:
                raise ValueError(f"its header has {size:,} bytes, at most {LARGEST_HEADER:,} are read")
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    if name in self.tensors:
                        self.twice.add(name)
                    self.tensors[name] = Stored(name, tuple(part.get_shape()), part.get_dtype(), path)
        except UserError as error:
            self.reasons.append(str(error))
        except (OSError, SafetensorError, ValueError) as error:
            self.reasons.append(f"'{path.name}' cannot be read as safetensors ({error})")

    def read(self, name: str) -> Tensor | None:
        """Return the values of a tensor.

        Return None if torch cannot compute with the type, or, with a reason, if the file is damaged.
        """
        if name in self.made:
            return self.made[name]()
        stored = self.tensors[name]
        path, name = stored.file, stored.name  # name of the tensor in the file
        if stored.dtype not in COMPUTED:
            return None
        if name in self._held:
            return self._held[name]
        try:
            if self._open is None or self._open[0] != path or self._read > REOPENED:
                self._open, self._read = (path, safe_open(path, framework="pt")), 0
            value: Tensor = self._open[1].get_tensor(name)
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            self.reasons.append(f"'{name}' of '{path.name}' cannot be read ({error})")
            return None
        self._read += value.numel() * value.element_size()
        return value


def read_bounded_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file of at most LARGEST_HEADER bytes. Raise UserError for a larger file."""
    if path.is_file() and path.stat().st_size > LARGEST_HEADER:
        raise UserError(f"{what}: '{path}' has {path.stat().st_size:,} bytes, at most {LARGEST_HEADER:,} are read.")
    return read_json(path, what, strict=True)


def read_legacy(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter_model.bin by name. Raise UserError if the file holds anything else."""
    try:
        with zipfile.ZipFile(regular_file(path)) as parts:
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("its parts are compressed, which torch never does")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file can make the reader raise any error
        raise UserError(f"'{path.name}' is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(_plain(key, value) for key, value in content.items()):
        raise UserError(f"'{path.name}' is not a mapping of plain tensors by name, as peft writes it")
    return content


def _plain(name: object, value: object) -> bool:
    """Return whether an entry of an older file is a name with a dense tensor that holds as many values as its shape says."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    dense = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
    return dense and value.untyped_storage().nbytes() >= value.numel() * value.itemsize


def part_of(name: str) -> tuple[str, str, str]:
    """Return module path, role and adapter name of a tensor of a LoRA file, from its name after PEFT_PREFIX.

    The roles are A, B, embedding_A, embedding_B, magnitude (of DoRA), bias (of B), stock (a copy of what modules_to_save
    replaced), other (of another variant), and saved (a parameter that is held whole, with its name in the model as the path).
    """
    match = re.fullmatch(r"(.*)\.lora_(embedding_|)([AB])(?:\.([^.]+))??(?:\.(weight|bias))?", name)
    if match and (bool(match[2]) is not bool(match[5])) and (match[5] != "bias" or match[3] == "B"):
        role = "bias" if match[5] == "bias" else match[2] + match[3]
        return match[1], role, match[4] or ""
    match = re.fullmatch(r"(.*)\.lora_magnitude_vector(?:\.([^.]+))??(?:\.weight)?", name)
    if match:
        return match[1], "magnitude", match[2] or ""
    if "lora_" in name:
        return name.partition(".lora_")[0], "other", ""
    if ".original_module." in name:
        return name, "stock", ""
    match = re.fullmatch(r"(.*)\.(?:modules_to_save(?:\.([^.]+))??|base_layer)\.([^.]+)", name)
    return (f"{match[1]}.{match[3]}", "saved", match[2] or "") if match else (name, "saved", "")


@dataclass
class ModuleFacts:
    """An adapted module.

    path: Path of the module in the model. key: Path in the file, without the prefix. named: Path in the settings. tensors:
    Tensors by role. rank: Rank of the tensors. declared: Rank by the settings, None without settings. scale: Factor of the
    update by the settings, None without settings. stacked: Whether the factors belong to experts in one parameter. experts:
    Number of these experts, from the ranks of file and settings.
    """

    path: str
    key: str
    named: str
    tensors: dict[str, Stored] = field(default_factory=dict)
    rank: int | None = None
    declared: int | None = None
    scale: float | None = None
    stacked: bool = False
    experts: int = 1

    @property
    def unpaired(self) -> bool:
        """Whether one of the two factors is missing."""
        return any(len(self.tensors.keys() & pair) == 1 for pair in ({"A", "B"}, {"embedding_A", "embedding_B"}))

    def update(self, values: Mapping[str, Tensor]) -> Update | None:
        """Return the update from its values by role.

        Return None if the values are not pairs of factors, or do not determine the update. Raise UserError or RuntimeError for
        factors that do not fit each other.
        """
        table = "embedding_A" in values
        names = ("embedding_A", "embedding_B") if table else ("B", "A")
        floating = all(value.dtype in FLOATING for value in values.values())
        if self.scale is None or not {*names} <= values.keys() <= UPDATES or not floating:
            return None
        B, A = (values[name].T if table else values[name] for name in names)  # peft transposes the table
        if self.experts > 1:  # A is (e*r, i) and B (o, r*e), the expert last
            pairs = zip(A.chunk(self.experts), (B[:, e :: self.experts] for e in range(self.experts)), strict=True)
            return Update(tuple(LowRank(b, a, scale=self.scale) for a, b in pairs))
        blocks, magnitude = (LowRank(B.flatten(1), A.flatten(1), scale=self.scale),), values.get("magnitude")
        if magnitude is None:
            return Update(blocks)
        return Update(blocks, magnitude.flatten()) if not table and magnitude.numel() == len(B) else None


@dataclass
class AdapterFacts:
    """The facts of an adapter folder.

    config: Settings as they are stored. settings: Settings of a LoRA of peft, if they can be read. tuner: Type of peft
    ("LORA"), or method of vismt. modules: Adapted modules by path. stored: Tensors with their roles. base: Name of the base in
    the settings. reasons: Descriptions of malformed parts.
    """

    folder: Path
    config: JsonObject = field(default_factory=dict)
    settings: PeftSettings | None = None
    tuner: str = ""
    modules: dict[str, ModuleFacts] = field(default_factory=dict)
    stored: StoredTensors = field(default_factory=StoredTensors)
    base: str | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Return the tensors by name."""
        return self.stored.tensors

    def with_role(self, *roles: str) -> list[Stored]:
        """Return the tensors that have one of these roles."""
        return [tensor for tensor in self.tensors.values() if tensor.role in roles]

    def unlisted(self) -> list[Stored]:
        """Return the parameters of a LoRA of peft that were trained whole and are not listed in its settings."""
        if self.settings is None:
            return []
        promised = [f"{name}." for name in texts(self.settings.modules_to_save)]
        return [
            tensor
            for tensor in self.with_role("saved")
            if not any(name in tensor.path for name in promised)
            and not (tensor.path.endswith("bias") and self.settings.bias != "none")
        ]

    def read_json(self, name: str) -> JsonObject:
        """Return the settings in a file of the folder. If they cannot be read, return {} and add a reason."""
        try:
            content = read_bounded_json(self.folder / name, f"'{name}'")
        except UserError as error:
            self.reasons.append(str(error))
            return {}
        if isinstance(content, dict):
            return content
        self.reasons.append(f"'{name}' holds a {type(content).__name__} in place of settings")
        return {}

    def read_peft(self) -> None:
        """Read a folder that peft wrote."""
        if (self.folder / PEFT_CONFIG).exists():
            self.config = self.read_json(PEFT_CONFIG)
        else:
            self.reasons.append(f"'{PEFT_CONFIG}' is missing: rank, alpha and targets are not known")
        self.tuner = text_of(self.config.get("peft_type")) or ""
        self.base = text_of(self.config.get("base_model_name_or_path"))
        self._read_settings()
        file = next((self.folder / name for name in (TENSORS, LEGACY_TENSORS) if (self.folder / name).exists()), None)
        if file is None:
            self.reasons.append(f"neither '{TENSORS}' nor '{LEGACY_TENSORS}' is in the folder")
            return
        self.stored.add(file)
        own = "" if self.tuner in ("", "LORA") else tuner_prefixes().get(self.tuner, "")
        parts: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            part = name.removeprefix(PEFT_PREFIX)
            place, role, adapter = _tuner_part(part, own) if own else part_of(part)
            if ".token_adapter." in part:  # rows of an embedding, at the path of its module
                place, role = part.partition(".token_adapter.")[0], "tokens"
            self.tensors[name] = tensor = replace(stored, path=place, role=role, adapter=adapter)
            if role not in WHOLE:
                parts.setdefault(place, {})[name if role == "tuner" else role] = tensor
        for key, tensors in sorted(parts.items()):
            path, named = stock_path(key, parts.keys())
            self.modules[path] = module = ModuleFacts(path, key, named, tensors)
            try:
                self._scale(module)
            except UserError as error:  # an expression of the settings that takes too long
                self.reasons.append(str(error))
                self.settings = None

    def _read_settings(self) -> None:
        if self.tuner == "LORA":
            try:
                self.settings = typed_settings(self.config)
            except UserError as error:
                self.reasons.append(str(error))
        elif self.config and self.tuner not in tuner_prefixes():
            known = ", ".join(sorted(tuner_prefixes())) or "none, as peft is not installed"
            self.reasons.append(f"peft_type is {shown_value(self.config.get('peft_type'))}; known tuners: {known}")

    def _scale(self, module: ModuleFacts) -> None:
        """Fill in the rank, the scale and the number of experts of a module."""
        factor, settings = module.tensors.get("A") or module.tensors.get("embedding_A"), self.settings
        if settings is not None:
            named = settings.names(module.named) and not settings.everywhere  # a name of linears does not name a stack
            module.stacked = not named and names_stack(settings.stack_owners, module.key)
            module.declared, scale = settings.scale(module.named)
            module.scale = scale * (1 if module.named == module.path else added(module.path, settings.peft_version))
        if factor is not None and factor.shape:
            module.rank = factor.shape[0]
            # the rank of experts in one tensor is e r
            if module.stacked and module.declared and not module.rank % module.declared:
                module.experts, module.rank = max(1, module.rank // module.declared), module.declared


def _tuner_part(name: str, own: str) -> tuple[str, str, str]:
    """Return `part_of` for a tuner whose tensors have names that begin with `own`.

    "vera_" covers the tensors that "vera_lambda_" shares.
    """
    pieces = name.split(".")
    stem = f"{own.partition('_')[0]}_"
    start = next((number for number, piece in enumerate(pieces) if piece.startswith(stem)), None)
    if start is None:
        return part_of(name)
    path = ".".join(pieces[:start])
    return path, "shared" if path in ("", "base_model") else "tuner", ""


def tuner_prefixes() -> Mapping[str, str]:
    """Return how tensor names of each tuner of the installed peft begin. Return nothing if peft is not installed."""
    try:
        table = importlib.import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING
    except ImportError:
        return {}
    return {kind.value: prefix for kind, prefix in table.items()}


def text_of(value: object) -> str | None:
    """Return a value of a JSON file if it is text."""
    return value if isinstance(value, str) else None
