"""The model that transformers makes of a config.json, and what its weights are called there and in a file.

The names in a file are not always those of the modules: transformers renames, stacks, splits and turns weights while it loads
them, by the type of the model. The model is built without values, and its own conversion is applied to the names of the file.
Nothing is fetched, no code of the folder is run, and sizes that would take long to build are refused. If the installed
transformers has no such conversion or does not know the type, no model is built, and names are not judged.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vismt.verification.facts import Facts
from vismt.verification.stored import Stored, StoredTensors

# Keys that fetch files, run other code than the model's own, or leave its weights as they are.
LEFT_OUT = re.compile(
    r"implementation|kernel|quantization_config|auto_map|dtype|^transformers_weights$|^_name_or_path$"
)
FETCHING = re.compile(r"^use_(timm|pretrained)_backbone$|^backbone$")
# Keys that say how many modules there are, and keys with such words that say how large they are.
COUNTS = re.compile(r"layer|depth|block|expert|stage|branch|codebook|^(num|n)_")
SIZES = re.compile(r"size|dim|width|vocab|position|ctx|emb|inner|token|patch|feature|class|norm|channel")
MOST, MOST_LABELS, LONGEST = 1024, 10**5, 500  # modules of a kind, labels, characters of a name that is converted
OF_TASKS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}


@dataclass(frozen=True)
class Library:
    """A model of transformers on the meta device. shapes: of its weights and buffers, by name. tied: sets of tied names."""

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

    adapter: whose class of model is taken, if the weights can be loaded into it.
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


def _classes(config: Mapping[str, Any], adapter: Facts | None) -> list[str]:
    """Return names of classes of transformers: those that an adapter was trained on first, then that of the checkpoint."""
    own = config.get("architectures")
    names: list[Any] = list(own) if isinstance(own, list) else []
    if adapter is not None:
        made = adapter.config.get("auto_mapping")
        task = adapter.config.get("task_type")
        wanted = [adapter.config.get("model"), made.get("base_model_class") if isinstance(made, dict) else None]
        names = [*wanted, _of_task(task, config), *names]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _of_task(task: object, config: Mapping[str, Any]) -> str | None:
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
    """Return the model of a config.json; None where the installed transformers cannot tell. text: the content."""
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


def _plain(config: Any, key: str = "") -> Any:
    """Return a configuration without what fetches or runs something else; None where it cannot be built in a short time."""
    if isinstance(config, dict):
        if any(FETCHING.search(name) and value for name, value in config.items()):
            return None
        parts = {name: _plain(value, name) for name, value in config.items() if not LEFT_OUT.search(name)}
        lost = any(parts[name] is None and config[name] is not None for name in parts)
        return None if lost else parts
    counted = COUNTS.search(key) is not None and SIZES.search(key) is None
    most = MOST_LABELS if key == "num_labels" else MOST
    if isinstance(config, list):
        parts_of_list = [_plain(value, key) for value in config]
        count = sum(value for value in config if isinstance(value, int)) if counted else 0
        return None if parts_of_list != config or max(count, len(config)) > 4 * most else parts_of_list
    return None if counted and isinstance(config, int) and config > most else config


def _transforms(library: Library) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the converters of a model, in transformers' order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    every = get_model_conversion_mapping(library.model)
    renamings, converters = (
        [one for one in every if isinstance(one, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    return renamings, converters


def _target(name: str, library: Library, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
    """Return the name of a weight in the model, and the pattern of the converter that makes it of this tensor."""
    from transformers.core_model_loading import rename_source_key

    if len(name) > LONGEST:
        return name, None
    prefix = library.model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, library.shapes)
    if target not in library.shapes and name in library.shapes:
        return rename_source_key(name, [], [], prefix, library.shapes)
    return target, pattern


def _converter(converters: Iterable[Any], pattern: str) -> Any:
    return next(one for one in converters if pattern in one.source_patterns)


def _join(
    facts: Facts,
    library: Library,
    converter: Any,
    target: str,
    parts: Sequence[tuple[str, str]],
    stored: StoredTensors,
) -> list[str]:
    """Take the weights in that a converter makes of several tensors of a file, or of one; return their names."""
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
