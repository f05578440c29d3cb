"""An adapter folder as data: adapter.json, read strictly, and its tensors, checked without a model.

adapter.json describes the layers, names the safetensors file with its SHA-256, and carries a digest of itself. Everything that
the file determines alone is checked here: types, ranges, and the tensors of each layer. save_load.py makes the checks that need
a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from vismt.base.errors import UserError, shown_value
from vismt.base.registry import PLACES
from vismt.config.typed import JsonFile, build
from vismt.lowrank.layers.base import MODULES, AdapterLayer, AdapterModule, LayerSpec
from vismt.lowrank.tensors import check_finite
from vismt.storage.files import JsonObject, is_sealed, read_json, read_tensors

FORMAT = 1
DESCRIPTION = "adapter.json"
SAMPLES = 16
# A layer whose entry in adapter.json has no name is recognised by the setting that only this layer has.
_UNNAMED = {"low_rank": None, "quantized": "grid", "slice": "dim"}
NOT_OURS = f"{DESCRIPTION} is not what vismt.save_adapter writes"


@dataclass(frozen=True)
class _Part:
    """Entry of an adapter module other than a layer: the name of its class, and its settings."""

    type: str
    settings: JsonObject


@dataclass(frozen=True)
class Description:
    """The content of adapter.json. sites: Entries of layers. parts: Entries of other adapter modules."""

    format: int
    method: str
    model: str
    options: JsonObject
    sites: list[JsonObject]
    also_train: list[str]
    base: str
    base_samples: dict[str, list[float]]
    tensors: str
    tensors_sha256: str
    sha256: str
    unchanged: list[str] = field(default_factory=list)
    parts: dict[str, _Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", PLACES["earlier names in files"].get(self.method, self.method))
        if not re.fullmatch(r"adapter-[0-9a-f]{12}\.safetensors", self.tensors):
            raise ValueError(f"tensors: {shown_value(self.tensors)} is not the name of a file of tensors")
        for key in ("also_train", "unchanged"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key}: a name is given twice")
        dropout = self.options.get("dropout", 0.0)
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"options['dropout']: {shown_value(dropout)}; it must be a number in [0, 1)")
        frozen = self.options.get("frozen", [])
        if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
            raise ValueError(f"options['frozen']: {shown_value(frozen)}; it must be a list of names")


@dataclass(frozen=True)
class _Site:
    """Fields that the entry of every layer holds besides its settings."""

    path: str
    kind: Literal["linear", "conv1d", "conv2d", "nn.Conv1d", "nn.Conv3d", "embedding", "parameter"]
    shape: tuple[int, int]
    layer: str | None = None

    def __post_init__(self) -> None:
        if not self.path or min(self.shape) < 1:
            raise ValueError(f"path {shown_value(self.path)}, shape {self.shape}")


def entry_of(spec: LayerSpec) -> JsonObject:
    """Return the entry of a spec in adapter.json. Empty settings are left out."""
    layer = {} if spec.layer.name in _UNNAMED else {"layer": spec.layer.name}
    entry = {"path": spec.path, "kind": spec.kind, "shape": spec.shape, **layer, **asdict(spec.settings)}
    return {name: value for name, value in entry.items() if value not in ("", (), None)}


def module_entries(specs: Iterable[LayerSpec]) -> dict[str, JsonObject]:
    """Return the entries of the adapter modules other than layers, by path."""
    others = [spec for spec in specs if not spec.has_weight]
    return {spec.path: {"type": spec.layer.name, "settings": asdict(spec.settings)} for spec in others}


def _spec(entry: Mapping[str, object], source: JsonFile, key: str) -> LayerSpec:
    common = {name: value for name, value in entry.items() if name in _Site.__dataclass_fields__}
    settings = {name: value for name, value in entry.items() if name not in common}
    site = build(_Site, common, source, key)
    name = site.layer or next((name for name, setting in _UNNAMED.items() if setting in settings), "low_rank")
    layer = _module(name, source)
    if not issubclass(layer, AdapterLayer):
        raise UserError(f"{source}: {key}.layer: '{name}' carries no update of a weight; its entry belongs into parts.")
    settings = getattr(layer.Settings, "from_earlier", dict)(settings)  # settings of files of earlier versions
    spec = LayerSpec(site.path, site.kind, site.shape, layer, build(layer.Settings, settings, source, key))
    try:
        layer.check_settings(spec)
    except ValueError as error:
        raise UserError(f"{source}: {key}: {error}.") from error
    return spec


def _part(path: str, entry: _Part, source: JsonFile) -> LayerSpec:
    kind, key = _module(entry.type, source), f"parts['{path}']"
    if issubclass(kind, AdapterLayer):
        raise UserError(
            f"{source}: {key}.type: '{entry.type}' carries the update of a weight; its entry belongs into sites."
        )
    return LayerSpec(path, "", (), kind, build(kind.Settings, entry.settings, source, f"{key}.settings"))


def _module(name: str, source: JsonFile) -> type[AdapterModule]:
    try:
        return MODULES[PLACES["earlier names in files"].get(name, name)]
    except UserError as error:
        what = source.removesuffix(f": {NOT_OURS}")
        raise UserError(f"{what}: {error} Import the file that registers it, or use a matching vismt.") from error


def compared(specs: Iterable[LayerSpec], unchanged: Iterable[str]) -> list[str]:
    """Return the paths of the modules whose weights identify the base."""
    return [
        *(spec.path for spec in specs if spec.has_weight),
        *(name[: -len(".weight")] for name in unchanged if name.endswith(".weight")),
    ]


def read_description(folder: Path, what: str = "") -> tuple[Description, list[LayerSpec]]:
    """Return the content of adapter.json and its specs. Raise UserError for a damaged or foreign file.

    what: Name of the file in messages.
    """
    what = what or f"adapter '{folder}'"
    content = read_json(folder / DESCRIPTION, what, strict=True)
    written = content.get("format", FORMAT) if isinstance(content, dict) else FORMAT
    if written != FORMAT:
        raise UserError(f"{what}: format {shown_value(written)}, this version reads {FORMAT}; use a matching vismt.")
    source = JsonFile(f"{what}: {NOT_OURS}")
    description = build(Description, content, source)
    specs = [_spec(entry, source, f"sites[{number}]") for number, entry in enumerate(description.sites)]
    try:
        _check_paths(description, specs)
    except ValueError as error:
        raise UserError(f"{source}: {error}.") from error
    specs += [_part(path, entry, source) for path, entry in description.parts.items()]
    if not is_sealed(content):
        raise UserError(f"{what}: {DESCRIPTION} was changed after it was written; save the adapter again.")
    return description, specs


def _check_paths(description: Description, specs: list[LayerSpec]) -> None:
    """Raise ValueError if a path is given twice, or the samples are of other weights than the ones that identify the base."""
    paths = {spec.path for spec in specs}
    if len(paths) < len(specs):
        raise ValueError("sites: a path is given twice")
    for name in description.also_train:
        if name.endswith(".weight") and name[: -len(".weight")] in paths:
            raise ValueError(f"also_train: '{name}' is adapted")
    for path in description.parts:
        if path in paths:
            raise ValueError(f"parts: '{path}' is adapted")
    if set(description.base_samples) != set(compared(specs, description.unchanged)):
        raise ValueError("base_samples: they are not of the weights that sites and unchanged name")
    for path, values in description.base_samples.items():
        if len(values) != SAMPLES:
            raise ValueError(f"base_samples['{path}']: {len(values)} values, needed {SAMPLES}")


def read_adapter(folder: Path) -> tuple[Description, list[LayerSpec], dict[str, Tensor]]:
    """Return the content of adapter.json, its specs and the tensors, without comparing them with a model.

    Raise UserError if a file is damaged, or a tensor of a layer is missing, has a wrong shape, or holds values that are not
    possible.
    """
    what = f"adapter '{folder}'"
    description, specs = read_description(folder)
    name = description.tensors
    payload, tensors = read_tensors(folder / name, what)
    if hashlib.sha256(payload).hexdigest() != description.tensors_sha256:
        raise UserError(f"{what}: '{name}' is not the file that {DESCRIPTION} describes; save the adapter again.")
    for spec in specs:
        if spec.has_weight:  # other modules may need a model
            shapes = layer_shapes([spec], tensors)
            check_tensors(what, shapes, tensors, strict=False)
            values = {key.removeprefix(f"{spec.path}."): tensors[key] for key in shapes}
            spec.layer.check_tensors(f"{what}: {spec.path}", spec, values)
    for name in set(description.also_train) & tensors.keys():
        check_finite(f"{what}: {name}", tensors[name])
    return description, specs, tensors


def layer_shapes(specs: Iterable[LayerSpec], tensors: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a file must hold for these specs. Optional tensors count if the file has any of them.

    tensors: Names of the tensors in the file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes.update({f"{spec.path}.{name}": shape for name, shape in spec.layer.tensor_shapes(spec).items()})
        optional = {f"{spec.path}.{name}": shape for name, shape in spec.layer.optional_shapes(spec).items()}
        if not optional.keys().isdisjoint(tensors):
            shapes.update(optional)
    return shapes


def check_tensors(
    what: str, needed: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], *, strict: bool = True
) -> None:
    """Raise UserError for the first tensor that is missing, has a wrong shape or, with `strict`, is unexpected.

    The message has both shapes.
    """
    for name, shape in needed.items():
        if name not in tensors:
            raise UserError(f"{what}: '{name}' is missing (needed {tuple(shape)}).")
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(f"{what}: {name}: saved {tuple(tensors[name].shape)}, needed {tuple(shape)}.")
    extra = sorted(set(tensors) - set(needed))
    if extra and strict:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{what}: unexpected '{extra[0]}' {tuple(tensors[extra[0]].shape)}{more}.")
