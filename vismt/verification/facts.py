"""The facts of a folder under verification (an adapter or a checkpoint), and the findings about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from vismt.backbones.weights import read_checkpoint
from vismt.base.errors import UserError
from vismt.lowrank.files.description import DESCRIPTION, layer_shapes, read_description
from vismt.lowrank.files.facts import (
    LEGACY,
    LEGACY_TENSORS,
    TENSORS,
    AdapterFacts,
    ModuleFacts,
    StoredTensors,
    read_bounded_json,
    read_legacy,
    text_of,
)
from vismt.lowrank.files.peft_settings import PEFT_CONFIG
from vismt.lowrank.layers.base import LayerSpec
from vismt.storage.files import JsonObject, file_digest
from vismt.storage.paths import stays_inside

Kind = Literal["vismt", "peft", "checkpoint", "none"]
Level = Literal["broken", "suspicious", "note"]
LEVELS: tuple[Level, ...] = ("broken", "suspicious", "note")
MERGE_COMMAND = "vismt merge ADAPTER --base MODEL --to OUT"
MODEL_CONFIG = "config.json"
TOKENIZER = {"added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model"}
TOKENIZER |= {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}
TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_out.weight")  # which peft saves along
WEIGHTS = "model.safetensors"
INDEX = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
LEGACY_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Finding:
    """Something about a folder that a user has to know.

    level: broken (a reader fails or computes something else), suspicious, or note (no effect on the verdict). code: Stable name
    of the kind. text: What was seen. fix: What to do. modules: Paths of the modules, empty for the whole folder.
    """

    level: Level
    code: str
    text: str
    fix: str = ""
    modules: tuple[str, ...] = ()


def shorten_names(modules: Sequence[str]) -> str:
    """Return the first three of these names and the number of the others, for a sentence."""
    rest = len(modules) - 3
    return ", ".join(f"'{name}'" for name in modules[:3]) + (f" and {rest} more" if rest > 0 else "")


@dataclass
class Facts(AdapterFacts):
    """The content of a folder with an adapter or a checkpoint.

    kind: Kind of its files. A folder of `write_repository`, which has both, counts as peft's. model_config: config.json, also
    beside an adapter. files: Names in the folder. specs: Specs of a vismt adapter by path.
    """

    kind: Kind = "none"
    model_config: JsonObject = field(default_factory=dict)
    files: tuple[str, ...] = ()
    specs: dict[str, LayerSpec] = field(default_factory=dict)

    @property
    def tokenizer(self) -> tuple[str, ...]:
        """Return the files of a tokenizer or chat template."""
        return tuple(name for name in self.files if name in TOKENIZER)

    @property
    def is_adapter(self) -> bool:
        return self.kind in ("vismt", "peft")


def read_facts(folder: str | Path, *, as_checkpoint: bool = False) -> Facts:
    """Return the facts of a folder (or of a checkpoint file). Raises UserError only if nothing exists at `folder`.

    as_checkpoint: Whether to ignore the files of an adapter beside the weights of a model.
    """
    path = Path(folder)
    if not path.exists():
        raise UserError(f"verify: '{path}' does not exist; give the folder of an adapter or a checkpoint.")
    facts = Facts(path)
    if path.is_file():
        facts.kind, facts.stored = "checkpoint", _read_weights(path)
    else:
        try:
            facts.files = tuple(sorted(entry.name for entry in path.iterdir()))
        except OSError as error:
            raise UserError(f"verify: '{path}' cannot be read ({error.strerror}).") from error
        facts.model_config = facts.read_json(MODEL_CONFIG) if MODEL_CONFIG in facts.files else {}
        if {PEFT_CONFIG, TENSORS, LEGACY_TENSORS} & set(facts.files) and not as_checkpoint:
            facts.kind = "peft"
            facts.read_peft()
        elif DESCRIPTION in facts.files and not as_checkpoint:
            _read_vismt(facts)
        elif any(Path(name).suffix in (".safetensors", *LEGACY) for name in facts.files):
            facts.kind, facts.config, facts.stored = "checkpoint", facts.model_config, _read_weights(path)
    if facts.kind == "checkpoint" and not facts.tensors and not facts.stored.reasons:
        facts.kind = "none"
    return facts


def _read_vismt(facts: Facts) -> None:
    facts.kind, facts.config = "vismt", facts.read_json(DESCRIPTION)
    facts.tuner = text_of(facts.config.get("method")) or ""
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
        facts.reasons.append(f"'{file.name}' lacks {shorten_names(lacking)}")
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


def _read_weights(path: Path) -> StoredTensors:
    """Return the tensors of a checkpoint file, or of a folder: the whole model's file, the files of an index, or all files."""
    stored = StoredTensors()
    single = path / WEIGHTS
    if path.is_file() or single.is_file():  # which transformers takes first
        stored.add(path if path.is_file() else single, _held)
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
        stored.add(path / name, _held)
    return stored


def _held(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an older checkpoint under their own names, also if it holds them under another key."""
    try:
        return read_legacy(path)
    except UserError:
        return read_checkpoint(path)
