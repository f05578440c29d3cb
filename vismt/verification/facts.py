"""What an adapter or checkpoint folder is, read without a model: its kind, configuration, modules and tensors.

Unlike the strict readers (vismt/lowrank/files), which refuse a folder with its first fault, this one says what is there and
collects what is wrong as reasons. Values are read one tensor at a time, on demand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vismt.base.errors import UserError, shown_value
from vismt.lowrank.files.description import DESCRIPTION, layer_shapes, read_description
from vismt.lowrank.files.peft_adapter import PREFIX, TENSORS, part_of
from vismt.lowrank.files.peft_layouts import added, names_stack, stock_path
from vismt.lowrank.files.peft_settings import CONFIG, PeftSettings, texts, typed_settings
from vismt.lowrank.layers.base import LayerSpec
from vismt.storage.files import file_digest
from vismt.verification.stored import LEGACY, Stored, StoredTensors, read_bounded_json, read_stored
from vismt.verification.verdict import names_of

Kind = Literal["vismt", "peft", "checkpoint", "none"]
MODEL_CONFIG = "config.json"
LEGACY_TENSORS = "adapter_model.bin"
TOKENIZER = {"added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model"}
TOKENIZER |= {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}
TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_out.weight")  # which peft saves along
WHOLE = ("saved", "stock", "shared", "tokens")  # roles of tensors that do not belong to one adapted module


@dataclass
class ModuleFacts:
    """An adapted module.

    path: of the module in the model. key: as the file spells it, without the prefix. named: as the settings name it. tensors: by
    role. rank: of the tensors. declared, scale: rank and factor of the update by the settings; None where there are none.
    experts: number of the experts in one tensor that have a pair of factors each.
    """

    path: str
    key: str
    named: str
    tensors: dict[str, Stored] = field(default_factory=dict)
    rank: int | None = None
    declared: int | None = None
    scale: float | None = None
    experts: int = 1

    @property
    def unpaired(self) -> bool:
        """Whether one of two factors is missing."""
        return any(len(self.tensors.keys() & pair) == 1 for pair in ({"A", "B"}, {"embedding_A", "embedding_B"}))


@dataclass
class Facts:
    """What a folder holds.

    kind: of its files; a folder of `write_repository`, which has both, counts as peft's. config: adapter_config.json,
    adapter.json or config.json. model_config: config.json, also beside an adapter. settings: of a LoRA of peft, where they can
    be read. tuner: peft's type ("LORA"), or the method of vismt. modules: by path. stored: the tensors, those of an adapter
    with their roles. base: its name by the configuration. files: names in the folder. reasons: what is malformed. specs: of a
    vismt adapter, by path.
    """

    folder: Path
    kind: Kind = "none"
    config: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    settings: PeftSettings | None = None
    tuner: str = ""
    modules: dict[str, ModuleFacts] = field(default_factory=dict)
    stored: StoredTensors = field(default_factory=StoredTensors)
    base: str | None = None
    files: tuple[str, ...] = ()
    reasons: list[str] = field(default_factory=list)
    specs: dict[str, LayerSpec] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Return the tensors by name."""
        return self.stored.tensors

    @property
    def tokenizer(self) -> tuple[str, ...]:
        """Return the files of a tokenizer or chat template."""
        return tuple(name for name in self.files if name in TOKENIZER)

    @property
    def is_adapter(self) -> bool:
        return self.kind in ("vismt", "peft")

    def with_role(self, *roles: str) -> list[Stored]:
        """Return the tensors of these roles."""
        return [tensor for tensor in self.tensors.values() if tensor.role in roles]

    def unnamed(self) -> list[Stored]:
        """Return the whole parameters of a LoRA of peft that its settings do not name."""
        if self.settings is None:
            return []
        promised = [f"{name}." for name in texts(self.settings.modules_to_save)]
        return [
            tensor
            for tensor in self.with_role("saved")
            if not any(name in tensor.path for name in promised)
            and not (tensor.path.endswith("bias") and self.settings.bias != "none")
        ]


def read_facts(folder: str | Path, *, as_checkpoint: bool = False) -> Facts:
    """Return what a folder (or a checkpoint file) holds. Raises UserError only where there is nothing at `folder`.

    as_checkpoint: pass by the files of an adapter beside the weights of a model.
    """
    path = Path(folder)
    if not path.exists():
        raise UserError(f"verify: '{path}' does not exist; give the folder of an adapter or a checkpoint.")
    facts = Facts(path)
    if path.is_file():
        facts.kind, facts.stored = "checkpoint", read_stored(path)
    else:
        try:
            facts.files = tuple(sorted(entry.name for entry in path.iterdir()))
        except OSError as error:
            raise UserError(f"verify: '{path}' cannot be read ({error.strerror}).") from error
        facts.model_config = _json(facts, MODEL_CONFIG) if MODEL_CONFIG in facts.files else {}
        if {CONFIG, TENSORS, LEGACY_TENSORS} & set(facts.files) and not as_checkpoint:
            _read_peft(facts)
        elif DESCRIPTION in facts.files and not as_checkpoint:
            _read_vismt(facts)
        elif any(Path(name).suffix in (".safetensors", *LEGACY) for name in facts.files):
            facts.kind, facts.config, facts.stored = "checkpoint", facts.model_config, read_stored(path)
    if facts.kind == "checkpoint" and not facts.tensors and not facts.stored.reasons:
        facts.kind = "none"
    return facts


def _json(facts: Facts, name: str) -> dict[str, Any]:
    try:
        content = read_bounded_json(facts.folder / name, f"'{name}'")
    except UserError as error:
        facts.reasons.append(str(error))
        return {}
    if isinstance(content, dict):
        return content
    facts.reasons.append(f"'{name}' holds a {type(content).__name__} in place of settings")
    return {}


def _read_peft(facts: Facts) -> None:
    facts.kind = "peft"
    if CONFIG in facts.files:
        facts.config = _json(facts, CONFIG)
    else:
        facts.reasons.append(f"'{CONFIG}' is missing: rank, alpha and targets are not known")
    facts.tuner = _text(facts.config.get("peft_type")) or ""
    facts.base = _text(facts.config.get("base_model_name_or_path"))
    _read_settings(facts)
    name = next((name for name in (TENSORS, LEGACY_TENSORS) if name in facts.files), None)
    if name is None:
        facts.reasons.append(f"neither '{TENSORS}' nor '{LEGACY_TENSORS}' is in the folder")
        return
    facts.stored.add(facts.folder / name, adapter=True)
    own = "" if facts.tuner in ("", "LORA") else tuner_prefixes().get(facts.tuner, "")
    for key, stored in facts.tensors.items():
        part = key.removeprefix(PREFIX)
        place, role, adapter = _tuner_part(part, own) if own else part_of(part)
        if ".token_adapter." in part:  # rows of an embedding, at the path of its module
            place, role = part.partition(".token_adapter.")[0], "tokens"
        facts.tensors[key] = replace(stored, path=place, role=role, adapter=adapter)
    parts: dict[str, dict[str, Stored]] = {}
    for tensor in facts.tensors.values():
        if tensor.role not in WHOLE:
            parts.setdefault(tensor.path, {})[tensor.name if tensor.role == "tuner" else tensor.role] = tensor
    for key, tensors in sorted(parts.items()):
        path, named = stock_path(key, parts.keys())
        facts.modules[path] = ModuleFacts(path, key, named, tensors)
        _scale_of_peft(facts.settings, facts.modules[path])


def _read_settings(facts: Facts) -> None:
    if facts.tuner == "LORA":
        try:
            facts.settings = typed_settings("the adapter", facts.config)
        except UserError as error:
            facts.reasons.append(str(error))
    elif facts.config and facts.tuner not in tuner_prefixes():
        known = ", ".join(sorted(tuner_prefixes())) or "none, as peft is not installed"
        facts.reasons.append(f"peft_type is {shown_value(facts.config.get('peft_type'))}; known tuners: {known}")


def _scale_of_peft(settings: PeftSettings | None, module: ModuleFacts) -> None:
    factor = module.tensors.get("A") or module.tensors.get("embedding_A")
    stack = settings and names_stack(settings.stack_owners, module.key) and not settings.names(module.named)
    if settings is not None:
        module.declared, scale = settings.scale(module.named)
        module.scale = scale * (1 if module.named == module.path else added(module.path, settings.peft_version))
    if factor is not None and factor.shape:
        module.rank = factor.shape[0]
        if stack and module.declared and not module.rank % module.declared:  # of experts in one parameter it is e r
            module.experts, module.rank = max(1, module.rank // module.declared), module.declared


def _read_vismt(facts: Facts) -> None:
    facts.kind, facts.config = "vismt", _json(facts, DESCRIPTION)
    facts.tuner = _text(facts.config.get("method")) or ""
    if facts.reasons:
        return
    try:
        description, specs = read_description(facts.folder, "the adapter")
    except UserError as error:
        if str(error) not in facts.reasons:
            facts.reasons.append(str(error))
        return
    facts.tuner, facts.specs = description.method, {spec.path: spec for spec in specs}
    file = facts.folder / description.tensors
    facts.stored.add(file)
    if not facts.stored.reasons and file_digest(file) != description.tensors_sha256:
        facts.reasons.append(f"'{file.name}' is not the file that {DESCRIPTION} describes; save the adapter again")
    trained = set(description.also_train)
    needed = layer_shapes([spec for spec in specs if spec.has_weight], facts.tensors)
    lacking = sorted((needed.keys() | trained - set(description.unchanged)) - facts.tensors.keys())
    if lacking and not facts.stored.reasons:
        facts.reasons.append(f"'{file.name}' lacks {names_of(lacking)}")
    held = {name: stored.shape for name, stored in facts.tensors.items()}
    facts.reasons += [
        f"'{name}' is {held[name]}, needed {shape}" for name, shape in needed.items() if held.get(name, shape) != shape
    ][:3]
    for name, stored in facts.tensors.items():
        path, _, leaf = name.rpartition(".")
        role = "saved" if name in trained else leaf.removeprefix("lora_") if path in facts.specs else "other"
        facts.tensors[name] = replace(stored, path=name if role == "saved" else path, role=role)
    facts.modules = {spec.path: ModuleFacts(spec.path, spec.path, spec.path) for spec in specs if spec.has_weight}
    for tensor in facts.tensors.values():
        if tensor.role != "saved" and tensor.path in facts.modules:
            facts.modules[tensor.path].tensors[tensor.role] = tensor
    for path, module in facts.modules.items():
        spec = facts.specs[path]
        module.rank = module.declared = spec.layer.factor_rank(spec) or None
        module.scale = getattr(spec.settings, "scale", None)


def _tuner_part(name: str, own: str) -> tuple[str, str, str]:
    """Return `part_of` for a tuner whose tensors have names that begin with `own`; "vera_" covers what "vera_lambda_" shares."""
    pieces = name.split(".")
    stem = f"{own.partition('_')[0]}_"
    start = next((number for number, piece in enumerate(pieces) if piece.startswith(stem)), None)
    if start is None:
        return part_of(name)
    path = ".".join(pieces[:start])
    return path, "shared" if path in ("", "base_model") else "tuner", ""


def tuner_prefixes() -> Mapping[str, str]:
    """Return the beginnings of tensor names by tuner, of the installed peft; none without it."""
    try:
        table = importlib.import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING
    except ImportError:
        return {}
    return {kind.value: prefix for kind, prefix in table.items()}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
