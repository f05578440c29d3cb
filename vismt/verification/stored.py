"""The tensors of a folder or file, by name: shapes from bounded headers, values one tensor at a time.

A malformed file becomes a reason, never an error: `vismt verify` gives a verdict on any folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismt.backbones.weights import read_checkpoint
from vismt.base.errors import UserError
from vismt.lowrank.files.peft_adapter import read_legacy
from vismt.storage.files import DTYPES, read_json
from vismt.storage.paths import regular_file, stays_inside

LARGEST_HEADER = 2**24  # bytes, and of a JSON file; 100,000 tensors have a header of this size
REOPENED = 2**28  # bytes read through one memory map, which count as memory of the process
COMPUTED = {*DTYPES.values(), "C64"}
WEIGHTS = "model.safetensors"
INDEX = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
LEGACY_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LEGACY = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    dtype: as safetensors names it, "BF16". The rest is of an adapter (facts.py). path: of its module in the model; of a saved
    parameter its own name there. role: A, B, C (a core), A0, B0 (a start that is subtracted), embedding_A, embedding_B,
    magnitude, bias (of B), saved (a whole parameter), tuner (of peft's other tuners), shared (by its modules), stock, other.
    adapter: a name of the adapter inside `name`.
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
    """Tensors by name, of one file or of several.

    reasons: why files or values cannot be read. twice: names in two files, of which the later counts. made: functions that
    return the values of weights that are made of several tensors (library.py).
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    twice: set[str] = field(default_factory=set)
    made: dict[str, Callable[[], Tensor | None]] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)
    _open: Any = None
    _read: int = 0

    def add(self, path: Path, *, adapter: bool = False) -> None:
        """Take the tensors of a file in. adapter: of a .bin file that peft wrote."""
        try:
            if path.suffix in LEGACY:
                held = read_legacy(path, f"'{path.name}'") if adapter else _held(path)
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
        """Return the values of a tensor; None for a type that torch cannot compute with, and with a reason for a damaged file."""
        if name in self.made:
            return self.made[name]()
        stored = self.tensors[name]
        path, name = stored.file, stored.name  # its name in the file
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
    """Return the content of a JSON file of at most LARGEST_HEADER bytes; UserError for others."""
    if path.is_file() and path.stat().st_size > LARGEST_HEADER:
        raise UserError(f"{what}: '{path}' has {path.stat().st_size:,} bytes, at most {LARGEST_HEADER:,} are read.")
    return read_json(path, what, strict=True)


def read_stored(path: Path) -> StoredTensors:
    """Return the tensors of a checkpoint: a file, or of a folder the one of a whole model, those that an index names, or all."""
    stored = StoredTensors()
    single = path / WEIGHTS
    if path.is_file() or single.is_file():  # which transformers takes first
        stored.add(path if path.is_file() else single)
        return stored
    index = next((path / name for name in INDEX if (path / name).exists()), None)
    if index is None:
        found = [file.name for ending in (".safetensors", *LEGACY) for file in sorted(path.glob(f"*{ending}"))]
        own = [name for name in found if not name.startswith("adapter")]
        names = [name for name in own if name.endswith(".safetensors")] or own
    else:
        try:
            content = read_bounded_json(index, f"'{index.name}'")
            named = content.get("weight_map") if isinstance(content, dict) else None
            files = list(named.values()) if isinstance(named, dict) else [""]
            if not all(isinstance(name, str) and stays_inside(name) for name in files):
                raise UserError(f"'{index.name}' has no weight_map to files of its folder.")
        except UserError as error:
            stored.reasons.append(str(error))
            return stored
        names = sorted(set(files))
    for name in names:
        stored.add(path / name)
    return stored


def _held(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an older checkpoint under their own names, or of one that holds them under another key."""
    try:
        return read_legacy(path, f"'{path.name}'")
    except UserError:
        return read_checkpoint(path)
