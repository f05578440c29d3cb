"""Open checkpoints by path or name, translate their names to the model that reads them, and locate the adapted weights.

The names in a file are not always the names of the modules. transformers renames, stacks, splits and turns weights while it loads
them, by the type of the model. The model is built without values, and its own conversion is applied to the names of the file.
Nothing is fetched, no code of the folder is run, and sizes that would take long to build are refused. If the installed
transformers has no such conversion or does not know the type, no model is built, and names are not judged.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.files.facts import ModuleFacts, Stored, StoredTensors
from vismt.lowrank.files.peft_layouts import stack_keys
from vismt.lowrank.files.peft_settings import selects
from vismt.lowrank.layers.parameter_modules import module_at
from vismt.verification.facts import Facts, read_facts
from vismt.verification.fit import BITS

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

# Keys that fetch files, run other code than the model's own, or leave its weights as they are.
_LEFT_OUT = re.compile(
    r"implementation|kernel|quantization_config|auto_map|dtype|^transformers_weights$|^_name_or_path$"
)
FETCHING = re.compile(r"^use_(timm|pretrained)_backbone$|^backbone$")
# Keys that say how many modules there are, and keys with such words that say how large they are.
COUNTS = re.compile(r"layer|depth|block|expert|stage|branch|codebook|^(num|n)_")
_SIZES = re.compile(r"size|dim|width|vocab|position|ctx|emb|inner|token|patch|feature|class|norm|channel")
_MOST, MOST_LABELS, _LONGEST = 1024, 10**5, 500  # modules of a kind, labels, characters of a name that is converted
OF_TASKS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
INNER = "language_model."  # the part that text-only and multimodal classes name differently
EARLIER = "under the names of an earlier transformers"  # a change of names
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linears are transposed


def open_checkpoint(place: str | Path, what: str) -> Facts:
    """Return the facts of a checkpoint: a folder or file, the name of an asset, or a model on the hub."""
    path = Path(place).expanduser()
    if not path.exists():
        from vismt.backbones.assets import get_asset, list_assets

        path = get_asset(str(place)) if str(place) in list_assets() else _from_hub(str(place), what)
    facts = read_facts(path)
    if facts.is_adapter and facts.model_config:  # a merged model with the adapter's files beside it
        facts = read_facts(path, as_checkpoint=True)
    if facts.kind != "checkpoint":
        raise UserError(f"verify: {what} '{place}' is not a checkpoint ({facts.kind}); give a folder with its weights.")
    return facts


def _from_hub(name: str, what: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"verify: {what} '{name}' is not a folder, a file or an asset, and the hub does not give it ({reason})."
        ) from error


@dataclass(frozen=True)
class Library:
    """A model of transformers on the meta device.

    shapes: Shapes of its weights and buffers, by name. tied: Sets of tied names.
    """

    model: Any
    shapes: dict[str, tuple[int, ...]]
    tied: tuple[frozenset[str], ...]

    def holds(self, path: str) -> bool:
        """Return whether the model has a module or a weight at a path."""
        return path in self.shapes or f"{path}.weight" in self.shapes or f"{path}.gate_up_proj" in self.shapes


@dataclass
class Translated:
    """A checkpoint under the names of the model that reads it.

    facts: Facts under the names of the model. A name that the model does not know stays as it is. raw: Facts under the names of
    the file. library: The model, None if it cannot be built. lacking: Names that the model has and the file lacks. misfits: Names
    with other shapes. unknown: Names of the file that the model does not use. parts: Names of the tensors that a weight is made
    of, by its name. These tensors are in `facts`, too.
    """

    facts: Facts
    raw: Facts
    library: Library | None = None
    parts: dict[str, list[str]] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def renamed(self, path: str) -> str:
        """Return the path that a path of the file's layout has in the model."""
        if self.library is None:
            return path
        return _target(f"{path}.weight", self.library, *_transforms(self.library))[0].removesuffix(".weight")


def translated(facts: Facts, adapter: Facts | None = None) -> Translated:
    """Return a checkpoint under the names of the model that transformers makes of it.

    adapter: Adapter whose class of model is taken, if the weights can be loaded into this class.
    """
    library = _library_of(facts, adapter)
    if library is None:
        return Translated(facts, facts)
    renamings, converters = _transforms(library)
    found = Translated(facts, facts, library)
    stored = replace(facts.stored, tensors={})
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, tensor in facts.tensors.items():
        target, pattern = _target(name, library, renamings, converters)
        if target not in library.shapes:
            found.unknown.append(name)
            stored.tensors.setdefault(name, tensor)
        elif pattern is None:
            stored.tensors[target] = tensor
        else:
            groups.setdefault(target, []).append((pattern, name))
    for target, parts in groups.items():
        made = _join(facts, library, _converter(converters, parts[0][0]), target, parts, stored)
        names = [name for _, name in parts]
        found.parts |= dict.fromkeys(made, names)
        found.unknown += [] if made else names
        for name in names:
            stored.tensors.setdefault(name, facts.tensors[name])
    packed = bool(facts.model_config.get("quantization_config"))
    present = stored.tensors.keys()
    tied = {name for group in library.tied if group & present for name in group}
    ignored = [re.compile(pattern) for pattern in getattr(library.model, "_keys_to_ignore_on_load_missing", None) or ()]
    found.lacking = [
        name
        for name in library.shapes.keys() - present - tied
        if not any(pattern.search(name) for pattern in ignored) and not name.endswith("num_batches_tracked")
    ]
    found.lacking.sort(key=list(library.shapes).index)
    found.misfits = [
        name
        for name in library.shapes
        if name in present and stored.tensors[name].shape != library.shapes[name] and not packed
    ]
    found.facts = replace(facts, stored=stored)
    return found


def _library_of(facts: Facts, adapter: Facts | None) -> Library | None:
    """Return the model of config.json: of the class that holds the most modules of the adapter, or of its own class."""
    config = facts.model_config
    names = _classes(config, adapter)
    text = json.dumps(config, sort_keys=True)
    best: tuple[int, Library] | None = None
    for name in names:
        library = _built(text, name)
        if library is None:
            continue
        paths = adapter.modules if adapter is not None else ()
        hits = sum(library.holds(path.replace(".base_layer", "")) for path in paths)
        if best is None or hits > best[0]:
            best = hits, library
        if hits == len(paths):
            break
    return best[1] if best else None


def _classes(config: Mapping[str, object], adapter: Facts | None) -> list[str]:
    """Return names of classes of transformers: first the classes that the adapter was trained on, then the checkpoint's."""
    own = config.get("architectures")
    names: list[object] = list(own) if isinstance(own, list) else []
    if adapter is not None:
        made = adapter.config.get("auto_mapping")
        task = adapter.config.get("task_type")
        wanted = [adapter.config.get("model"), made.get("base_model_class") if isinstance(made, dict) else None]
        names = [*wanted, _of_task(task, config), *names]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _of_task(task: object, config: Mapping[str, object]) -> str | None:
    """Return the name of the class that peft's task type takes for a type of model."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    known = OF_TASKS.get(str(task))
    table = f"MODEL_FOR_{known}_MAPPING_NAMES" if known else "MODEL_MAPPING_NAMES"
    name = getattr(modeling_auto, table, {}).get(str(config.get("model_type")))
    return name[0] if isinstance(name, tuple) else name


@functools.lru_cache(maxsize=8)
def _built(text: str, name: str) -> Library | None:
    """Return the model of a config.json. None if the installed transformers does not know it. text: Content of the file."""
    config = _plain(json.loads(text))
    if config is None:
        return None
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: F401 - transformers 5

        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return None
        made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        made._attn_implementation = "eager"
        with torch.device("meta"):
            model = kind(made)
    except Exception:  # whatever a class makes of values that are not its own
        return None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in pairs.items():
        groups.setdefault(source, {source}).add(target)
    return Library(model, shapes, tuple(frozenset(group) for group in groups.values()))


def _plain(config: object, key: str = "") -> Any:
    """Return a configuration without keys that fetch or run something else. None if its model takes long to build."""
    if isinstance(config, dict):
        if any(FETCHING.search(name) and value for name, value in config.items()):
            return None
        parts = {name: _plain(value, name) for name, value in config.items() if not _LEFT_OUT.search(name)}
        lost = any(parts[name] is None and config[name] is not None for name in parts)
        return None if lost else parts
    counted = COUNTS.search(key) is not None and _SIZES.search(key) is None
    most = MOST_LABELS if key == "num_labels" else _MOST
    if isinstance(config, list):
        parts_of_list = [_plain(value, key) for value in config]
        count = sum(value for value in config if isinstance(value, int)) if counted else 0
        return None if parts_of_list != config or max(count, len(config)) > 4 * most else parts_of_list
    return None if counted and isinstance(config, int) and config > most else config


def _transforms(library: Library) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return the renamings and the converters of a model, in transformers' order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    every = get_model_conversion_mapping(library.model)
    renamings = [one for one in every if isinstance(one, WeightRenaming)]
    return renamings, [one for one in every if isinstance(one, WeightConverter)]


def _target(
    name: str, library: Library, renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[str, str | None]:
    """Return the name of a weight in the model, and the pattern of the converter that makes it of this tensor."""
    from transformers.core_model_loading import rename_source_key

    if len(name) > _LONGEST:
        return name, None
    prefix = library.model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, library.shapes)
    if target not in library.shapes and name in library.shapes:
        return rename_source_key(name, [], [], prefix, library.shapes)
    return target, pattern


def _converter(converters: Iterable[WeightConverter], pattern: str) -> WeightConverter:
    return next(one for one in converters if pattern in one.source_patterns)


def _join(
    facts: Facts,
    library: Library,
    converter: Any,
    target: str,
    parts: Sequence[tuple[str, str]],
    stored: StoredTensors,
) -> list[str]:
    """Add the weights that a converter makes of tensors of the file, and return the names of these weights."""
    from transformers.core_model_loading import dot_natural_key

    parts = sorted(parts, key=lambda part: dot_natural_key(part[1]))

    def converted(values: Iterable[Tensor]) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)  # it keeps what it collects
        for (pattern, name), value in zip(parts, values, strict=True):
            own.add_tensor(target, name, pattern, lambda value=value: value)
        made = own.convert(target, model=library.model, config=library.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @functools.lru_cache(maxsize=1)
    def values() -> dict[str, Tensor]:
        read = [facts.stored.read(name) for _, name in parts]
        return {} if any(value is None for value in read) else converted(value for value in read if value is not None)

    first = facts.tensors[parts[0][1]]
    try:
        empty = converted(torch.empty(facts.tensors[name].shape, device="meta") for _, name in parts)
    except Exception:  # parts that are missing or do not fit
        return []
    made = [name for name in empty if name in library.shapes]
    for name, value in empty.items():
        if name in made:
            stored.tensors[name] = Stored(first.name, tuple(value.shape), first.dtype, first.file)
            stored.made[name] = lambda name=name: values().get(name)  # type: ignore[misc]
    return made


# ---- adapted weights
@dataclass
class Located:
    """The weights of adapted modules in a checkpoint.

    checkpoint: The checkpoint under the names of its library. names: Names of their tensors by path. change: The change of the
    paths under which they were found. transposed: Whether square weights are (i, o). stacks: Whether the matrices of a stack of
    experts are (i, o), by path.
    """

    checkpoint: Translated
    names: dict[str, str] = field(default_factory=dict)
    change: str = ""
    transposed: bool = False
    stacks: dict[str, bool] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        return self.checkpoint.facts

    @property
    def library(self) -> Library | None:
        return self.checkpoint.library

    @cached_property
    def stems(self) -> set[str]:
        """Return the paths of the weights, with a star for each number."""
        return {re.sub(r"\d+", "*", name.removesuffix(".weight")) for name in self.facts.tensors}

    def lacks(self, path: str) -> bool:
        """Return whether the checkpoint has no module at a path.

        If the library of the checkpoint is not known, a path is absent only if other layers have a module of its name.
        """
        known = self.library is not None or re.sub(r"\d+", "*", path) in self.stems
        return path not in self.names and known

    def knows(self, facts: Facts) -> bool:
        """Return whether each module is found or known to be absent."""
        return all(path in self.names or self.lacks(path) for path in facts.modules)

    def misfits(self, module: ModuleFacts, of_peft: bool) -> bool:
        """Return whether the factors of a module do not fit its weight here.

        of_peft: Whether the factors of a convolution have as many dimensions as its weight. vismt stores matrices.
        """
        shape, stored, A = shape_of(module), self.shape(module.path), module.tensors.get("A")
        if shape is None or not stored or module.path in self.stacks:
            return False
        flat = (stored[0], int(torch.Size(stored[1:]).numel()))
        turned = len(stored) == 2 and stored[::-1] == shape
        return (flat != shape and not turned) or (of_peft and A is not None and len(A.shape) != len(stored) > 1)

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the stored shape of a module's weight. () if the checkpoint has no such weight."""
        return self.facts.tensors[self.names[path]].shape if path in self.names else ()

    def matrix(self, path: str, shape: tuple[int, int]) -> Tensor | None:
        """Return the weight (o, i) of a module. None if it is missing, has another shape, or is not of a float type."""
        stored = self.shape(path)
        value = self.facts.stored.read(self.names[path]) if stored else None
        if value is None or value.dtype not in BITS:
            return None
        if path in self.stacks:
            value = (value.mT if self.stacks[path] else value).flatten(0, 1)
        elif stored == shape[::-1] and (shape[0] != shape[1] or self.transposed):
            value = value.T
        return value.flatten(1) if value.flatten(1).shape == shape else None


def locate(facts: Facts, checkpoint: Translated) -> Located:
    """Find the weights of the adapted modules, under the change of names that finds the most of them."""
    names = checkpoint.facts.tensors
    paths = list(facts.modules)
    stacks = _stacks(facts, checkpoint.library)

    def hits(change: Callable[[str], str]) -> dict[str, str]:
        found = {path: name for path, (name, _) in stacks.items() if name in names}
        for path in paths:
            name = change(path)
            weight = next((known for known in (f"{name}.weight", name) if known in names), None)
            if weight is not None and path not in stacks:
                found[path] = weight
        return found

    changes: dict[str, Callable[[str], str]] = {"": lambda path: path}
    if checkpoint.library is not None:
        changes[EARLIER] = lambda path: path if f"{path}.weight" in names else checkpoint.renamed(path)
    changes[f"without '{INNER}'"] = lambda path: path.replace(INNER, "", 1)
    inner = {
        name.replace(INNER, "", 1).removesuffix(".weight"): name.removesuffix(".weight")
        for name in names
        if INNER in name
    }
    changes[f"with '{INNER}'"] = lambda path: inner.get(path, path)
    first = next(iter(paths), "").partition(".")[0]
    changes[f"without '{first}.'"] = lambda path: path.removeprefix(f"{first}.")
    for ending in paths[:1]:
        for name in names:
            if name.endswith(f".{ending}.weight"):
                before = name.removesuffix(f"{ending}.weight")
                changes[f"with '{before}'"] = lambda path, before=before: f"{before}{path}"  # type: ignore[misc]
    found = {label: hits(change) for label, change in changes.items()}
    best = max(found, key=lambda label: (len(found[label]), not label))
    located = Located(checkpoint, found[best], best if found[best] else "")
    located.stacks = {path: turned for path, (_, turned) in stacks.items() if path in located.names}
    shapes = [(shape_of(facts.modules[path]), located.shape(path)) for path in located.names]
    known = [(shape, stored) for shape, stored in shapes if shape and len(stored) == 2 and shape[0] != shape[1]]
    turned = sum(stored == shape[::-1] for shape, stored in known)
    kind = checkpoint.facts.config.get("model_type")
    located.transposed = turned > 0.5 * len(known) if known else kind in CONV1D
    return located


def _stacks(facts: Facts, library: Library | None) -> dict[str, tuple[str, bool]]:
    """Return the name of each stack of experts that is adapted, and whether its matrices are (i, o), by path."""
    wanted = (facts.settings and facts.settings.target_parameters) or []
    if library is None:
        return {}
    own = [path for path in facts.specs if len(library.shapes.get(path, ())) == 3]
    if own or not wanted:
        return {path: (path, bool(getattr(module_at(library.model, path), "transposed", False))) for path in own}
    chosen = [name for name, value in library.model.named_parameters() if value.ndim == 3 and selects(wanted, name)]
    keys = stack_keys(library.model, [name for name in chosen if "." in name])
    turned = {name: bool(getattr(module_at(library.model, name), "transposed", False)) for name in keys}
    return {key: (name, turned[name]) for name, key in keys.items() if key in facts.modules}


def unheld(facts: Facts, base: Located) -> list[str]:
    """Return the linear layers that the settings name and the file lacks, although it has them for other layers."""
    if facts.settings is None or base.change or len(base.names) < len(facts.modules):
        return []
    matrices = [name for name, stored in base.facts.tensors.items() if len(stored.shape) > 1]
    paths = {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")}
    stems = {re.sub(r"\d+", "*", path) for path in facts.modules}
    alike = (path for path in paths - facts.modules.keys() if re.sub(r"\d+", "*", path) in stems)
    return sorted(path for path in alike if facts.settings.names(path))


def shape_of(module: ModuleFacts) -> tuple[int, int] | None:
    """Return (o, i) of the update by the shapes of its factors. None if it has no factors."""
    A, B = (module.tensors.get(role) for role in ("A", "B"))
    if A is not None and B is not None and len(A.shape) >= 2 and len(B.shape) >= 2 and A.shape[0] == B.shape[1]:
        return B.shape[0] * module.experts, int(torch.Size(A.shape[1:]).numel())
    A, B = (module.tensors.get(role) for role in ("embedding_A", "embedding_B"))
    if A is not None and B is not None and len(A.shape) == len(B.shape) == 2:
        return A.shape[1], B.shape[0]
    return None


def equal(W: Tensor, M: Tensor) -> bool:
    """Return whether two tensors are equal, or one is a cast of the other."""
    return torch.equal(W.to(M.dtype), M) or torch.equal(M.to(W.dtype), W)


def same_parameter(path: str, name: str) -> bool:
    """Return whether two names are of one parameter: equal, or one begins deeper in the model than the other."""
    return name == path or name.endswith(f".{path}") or path.endswith(f".{name}")


def find_parameter(path: str, checkpoint: Facts) -> str | None:
    """Return the name that a checkpoint has for a parameter."""
    names = checkpoint.tensors
    return path if path in names else next((name for name in names if same_parameter(path, name)), None)
