"""Adapters on disk: adapter.json describes the layers and names the safetensors file with the tensors.

The tensors are written first, under a name of their digest, and the JSON that names them last: a save that is cut short
leaves the one before. Loading is strict: a missing or unexpected tensor, another shape or another base model are errors
that leave the model as it was. The base is recognised by samples of the adapted weights, compared within half-precision
rounding, so that a cast of the same checkpoint is still the same base; what is not adapted is not compared.
Where weights themselves are trained (no factors), only those that changed are written, and the others identify the base.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.files import atomic_write, locked, read_json, read_tensors, write_tensors
from vismt.lowrank.adapter_layer import LAYERS, AdapterLayer
from vismt.lowrank.backups import unchanged_tensors
from vismt.lowrank.inject import AdaptRecord, adapter_layers, attach, install, need_record, record_of, refuse_switched
from vismt.lowrank.layer_spec import LayerSpec
from vismt.lowrank.targets import kind_of, matrix_shape
from vismt.lowrank.wrappers import AddedModule, ModuleWrapper, stock_order, wrapper_type, wrappers_of

FORMAT = 1
DESCRIPTION = "adapter.json"
SAMPLES = 16
WAIT_S = 60  # for another process that saves into the same folder
# Layers of version 0.1.0, whose entries in adapter.json do not name the layer: the setting that only theirs have.
UNNAMED = {"low_rank": None, "quantized": "grid", "slice": "dim"}


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the factors (and also_train parameters) of an adapted model; each file appears whole or not at all.

    Args:
        model: an adapted model.
        folder: made where it is missing.

    Returns:
        The folder.

    Raises:
        UserError: for a stock model, a model on the meta device, and a folder that cannot be written.
    """
    record = need_record(model, "save_adapter")
    tensors = adapter_tensors(model)
    if any(value.is_meta for value in tensors.values()):
        raise UserError("save_adapter: the model is on the meta device, which holds no values to save.")
    # Beside factors or wrappers all counts as changed: a head may be fresh.
    unchanged = [] if record.sites or record.wrappers else unchanged_tensors(record.also_train, tensors)
    tensors = {name: value for name, value in tensors.items() if name not in unchanged}
    paths = _compared(record.sites, unchanged)
    folder = Path(folder)
    with locked(folder, WAIT_S), stock_order(model):
        digest = write_tensors(folder / "adapter-{digest}.safetensors", tensors)
        description = {
            "format": FORMAT,
            "method": record.method,
            "model": type(model).__name__,
            "options": record.options,
            "sites": [_entry(spec) for spec in record.sites],
            "also_train": sorted(record.also_train),
            "unchanged": unchanged,
            "parts": record.wrappers,
            "base": fingerprint(model, paths),
            "base_samples": base_samples(model, paths),
            "tensors": f"adapter-{digest[:12]}.safetensors",
            "tensors_sha256": digest,
        }
        atomic_write(folder / DESCRIPTION, json.dumps(description))
        for stale in set(folder.glob("adapter-*.safetensors")) - {folder / description["tensors"]}:
            stale.unlink()
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, on_other_base: str = "error") -> nn.Module:
    """Put a saved adapter on a stock model, or its values into a model that is adapted in the same way.

    Args:
        model: changed in place.
        folder: what `save_adapter` wrote.
        on_other_base: "error" refuses a base whose fingerprint differs, "warn" goes on with a warning.

    Returns:
        The model.

    Raises:
        UserError: for damaged files, another model, and a missing, unexpected or misshapen tensor; nothing is changed.
    """
    folder = Path(folder)
    refuse_switched(model, "load_adapter")
    description, specs, tensors = read_adapter(folder)
    record = record_of(model)
    if record is not None and _identity(record) != (
        description["method"],
        specs,
        sorted(description["also_train"]),
        description["parts"],
    ):
        raise UserError(f"adapter '{folder}': the model already carries another '{record.method}'; unadapt it first.")
    _check_modules(model, folder, description, specs, tensors)
    unchanged = description["unchanged"]
    parameters = dict(model.named_parameters())
    paths = _compared(specs, [name for name in unchanged if name in parameters])
    with stock_order(model):
        samples, base = base_samples(model, paths), fingerprint(model, paths)
    if not same_base(samples, description["base_samples"]):
        made_for = f"{description['model']} (weights {description['base']})"
        other_base(
            f"adapter '{folder}' was made for {made_for}, this is {type(model).__name__} (weights {base})",
            on_other_base,
        )
    _check_tensors(model, folder, description, specs, tensors)
    if record is None:
        install(model, description["method"], specs, description["options"], description["also_train"])
        for path, entry in description["parts"].items():
            base_module = dict(model.named_modules()).get(path)
            attach(model, path, wrapper_type(entry["type"], path).around(base_module, entry["settings"]))
    with stock_order(model):
        fill(model, tensors)
    if record is not None:
        fill(model, {name: record.also_train[name] for name in unchanged})
    return model


def _identity(record: AdaptRecord) -> tuple[str, list[LayerSpec], list[str], dict[str, Any]]:
    """Return what a file has to agree with to be loaded into an adapted model."""
    return record.method, record.sites, sorted(record.also_train), record.wrappers


def _entry(spec: LayerSpec) -> dict[str, Any]:
    """Return a spec as adapter.json holds it: empty settings are left out."""
    layer = {} if spec.layer.name in UNNAMED else {"layer": spec.layer.name}
    entry = {"path": spec.path, "kind": spec.kind, "shape": spec.shape, **layer, **asdict(spec.settings)}
    return {name: value for name, value in entry.items() if value not in ("", None)}


def _spec(entry: Mapping[str, Any]) -> LayerSpec:
    """Return the spec of an entry of adapter.json; KeyError, TypeError or ValueError for one that is malformed."""
    settings = dict(entry)
    path, kind, shape = (settings.pop(name) for name in ("path", "kind", "shape"))
    name = settings.pop("layer", None)
    if name is None:
        name = next((name for name, setting in UNNAMED.items() if setting in settings), "low_rank")
    layer = LAYERS[name]
    return LayerSpec(path, kind, tuple(shape), layer, layer.Settings(**settings))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return everything an adapter file holds, by state_dict key: tensors of layers and wrappers, also_train parameters."""
    record = need_record(model, "adapter")
    tensors: dict[str, Tensor] = {}
    for path, module in [*adapter_layers(model).items(), *wrappers_of(model).items()]:
        tensors.update({f"{path}.{name}": value for name, value in module.tensors().items()})
    tensors.update({name: model.get_parameter(name) for name in record.also_train})
    return tensors


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an adapted model; starts that the layers lack are created."""
    of_layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, AdapterLayer) and leaf != "bias":
            of_layers.setdefault(path, {})[leaf] = value
        elif isinstance(module, ModuleWrapper):
            module.restore(leaf, value)
        else:
            getattr(module, leaf).copy_(value)
    for path, values in of_layers.items():
        model.get_submodule(path).fill(values)


def _compared(specs: Iterable[LayerSpec], unchanged: Iterable[str]) -> list[str]:
    """Return the paths of the modules whose weights identify the base."""
    return [
        *(spec.path for spec in specs),
        *(name[: -len(".weight")] for name in unchanged if name.endswith(".weight")),
    ]


def base_samples(model: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """Return up to 16 values of each of these base weights, at places that depend on its path; none on the meta device."""
    samples: dict[str, list[float]] = {}
    record = record_of(model)
    for path in sorted(paths):
        weight = record.also_train.get(f"{path}.weight") if record is not None else None
        flat = (model.get_submodule(path).weight if weight is None else weight).detach().flatten()
        if flat.is_meta:
            samples[path] = []
            continue
        seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
        places = torch.randint(flat.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(seed))
        samples[path] = flat[places.to(flat.device)].double().tolist()
    return samples


def other_base(message: str, on_other_base: str) -> None:
    """Raise UserError with `message`, or with on_other_base "warn" give a warning."""
    if on_other_base != "warn":
        raise UserError(f"{message}. Load the base it was trained on, or pass on_other_base='warn'.")
    warnings.warn(message, stacklevel=3)


def same_base(samples: Mapping[str, list[float]], saved: Mapping[str, list[float]]) -> bool:
    """Return whether samples agree within 1 % of each weight's largest one: bf16 rounds by at most 0.4 % of a value."""
    for path, values in samples.items():
        expected = saved.get(path, [])
        largest = max((abs(value) for value in expected), default=0.0)
        if values and expected and any(abs(a - b) > 0.01 * largest for a, b in zip(values, expected, strict=True)):
            return False
    return True


def fingerprint(model: nn.Module, paths: Iterable[str]) -> str:
    """Return the weight fingerprint: twelve hex digits of the samples at `paths`, for messages and records."""
    return hashlib.sha256(json.dumps(base_samples(model, paths)).encode()).hexdigest()[:12]


def read_adapter(folder: Path) -> tuple[dict[str, Any], list[LayerSpec], dict[str, Tensor]]:
    """Return the content of adapter.json, its specs and the tensors, not compared with any model.

    Raises UserError for damaged files.
    """
    what = f"adapter '{folder}'"
    description = read_json(folder / DESCRIPTION, what)
    try:
        if description["format"] != FORMAT:
            raise UserError(
                f"{what}: format {description['format']}, this version reads {FORMAT}; use a matching vismt."
            )
        description.setdefault("parts", {})
        description.setdefault("unchanged", [])
        well_formed = _well_formed(description)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {DESCRIPTION} is not what vismt.save_adapter writes ({error!r}).") from error
    if not well_formed:
        raise UserError(f"{what}: {DESCRIPTION} is not what vismt.save_adapter writes.")
    specs = _specs(what, description["sites"])
    name = description["tensors"]
    payload, tensors = read_tensors(folder / name, what)
    if hashlib.sha256(payload).hexdigest() != description["tensors_sha256"]:
        raise UserError(f"{what}: '{name}' is not the file that {DESCRIPTION} describes; save the adapter again.")
    return description, specs, tensors


def _well_formed(description: Mapping[str, Any]) -> bool:
    """Return whether the values of adapter.json have the right types; KeyError and the like where some are missing."""
    texts = [description[key] for key in ("method", "model", "base", "tensors", "tensors_sha256")]
    if not all(isinstance(text, str) for text in texts):
        return False
    types = {"options": dict, "also_train": list, "unchanged": list, "base_samples": dict, "sites": list, "parts": dict}
    if not all(isinstance(description[key], kind) for key, kind in types.items()):
        return False
    wrappers = description["parts"].values()
    if not all(isinstance(entry["type"], str) and isinstance(entry["settings"], dict) for entry in wrappers):
        return False
    names = re.fullmatch(r"adapter-[0-9a-f]{12}\.safetensors", description["tensors"])
    return names is not None and set(description["unchanged"]) <= set(description["also_train"])


def _specs(what: str, entries: Iterable[Mapping[str, Any]]) -> list[LayerSpec]:
    """Return the specs of adapter.json; UserError for a malformed entry and a layer that is not registered."""
    try:
        return [_spec(entry) for entry in entries]
    except UserError as error:
        raise UserError(f"{what}: {error} Import the file that registers it.") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{what}: {DESCRIPTION} is not what vismt.save_adapter writes ({error!r}).") from error


def _check_modules(
    model: nn.Module,
    folder: Path,
    description: Mapping[str, Any],
    specs: Iterable[LayerSpec],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise UserError unless the model has every adapted module, with its shape."""
    modules = dict(model.named_modules())
    made_for = f"adapter '{folder}' was made for {description['model']}, this model is {type(model).__name__}"
    for spec in specs:
        module = modules.get(spec.path)
        if isinstance(module, AdapterLayer):
            shape = (module.out_features, module.in_features)
        elif module is not None and kind_of(module) is not None:
            shape = matrix_shape(module)
        else:
            raise UserError(f"{made_for} (it has no linear or convolution '{spec.path}').")
        if shape != spec.shape:
            raise UserError(f"{made_for} ({spec.layer.shape_mismatch(spec, shape, tensors)}).")


def _check_tensors(
    model: nn.Module,
    folder: Path,
    description: Mapping[str, Any],
    specs: Iterable[LayerSpec],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise UserError for a missing or unexpected tensor, and for a shape that does not follow from its spec."""
    needed = layer_shapes(specs, tensors)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for path, entry in description["parts"].items():
        wrapper = wrapper_type(entry["type"], f"adapter '{folder}'")
        if path not in modules and not issubclass(wrapper, AddedModule):
            raise UserError(
                f"adapter '{folder}': this model has no '{path}' to put a {entry['type'].split(':')[-1]} on."
            )
        shapes = wrapper.check(path, modules.get(path), entry["settings"])
        needed.update({f"{path}.{name}": shape for name, shape in shapes.items()})
    for name in description["also_train"]:
        if name not in parameters:
            raise UserError(f"adapter '{folder}': this model has no parameter '{name}' to load.")
        if name not in description["unchanged"]:
            needed[name] = tuple(parameters[name].shape)
    check_tensors(f"adapter '{folder}'", needed, tensors)


def layer_shapes(specs: Iterable[LayerSpec], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a file must hold for these specs, optional ones where it has any of them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes.update({f"{spec.path}.{name}": shape for name, shape in spec.tensors().items()})
        optional = {f"{spec.path}.{name}": shape for name, shape in spec.layer.optional_shapes(spec).items()}
        if not optional.keys().isdisjoint(tensors):
            shapes.update(optional)
    return shapes


def check_tensors(what: str, needed: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for the first missing, unexpected or misshapen tensor, with both shapes."""
    for name, shape in needed.items():
        if name not in tensors:
            raise UserError(f"{what}: '{name}' is missing (needed {tuple(shape)}).")
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(f"{what}: {name}: saved {tuple(tensors[name].shape)}, needed {tuple(shape)}.")
    extra = sorted(set(tensors) - set(needed))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{what}: unexpected '{extra[0]}' {tuple(tensors[extra[0]].shape)}{more}.")
