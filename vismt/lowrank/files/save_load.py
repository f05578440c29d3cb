"""Save and load adapters: adapter.json describes the layers and names the safetensors file with the tensors.

The tensors are written first, under a name that holds their digest. The JSON file that names them is written last, so that a
save that is cut short leaves the earlier adapter in place. Loading is strict. A missing or unexpected tensor, another shape,
values that are not finite, or another base model are errors, and they leave the model as it was. The base is recognised by
samples of the adapted weights. The samples are compared within half-precision rounding, so that a cast of a checkpoint is still
the same base. Weights that are not adapted are not compared. If a method trains weights themselves (no factors), only the
changed weights are written, and the other weights identify the base.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.files.description import (
    DESCRIPTION,
    FORMAT,
    SAMPLES,
    Description,
    check_tensors,
    compared,
    entry_of,
    layer_shapes,
    module_entries,
    read_adapter,
)
from vismt.lowrank.layers.base import AdapterLayer, LayerSpec, adapter_modules
from vismt.lowrank.layers.parameter_modules import module_at
from vismt.lowrank.layers.stock_modules import LINEAR, dense_weight, kind_of, matrix_shape
from vismt.lowrank.model.inject import install, undone_on_error
from vismt.lowrank.model.named import active_adapter, new_adapter
from vismt.lowrank.model.record import (
    adapter_names,
    need_record,
    record_of,
    refuse_offloaded,
    unchanged_tensors,
    was_trained,
)
from vismt.lowrank.model.targets import target_refusals
from vismt.lowrank.tensors import check_finite, check_parameter, need_finite
from vismt.storage.files import JsonObject, atomic_write, sealed, write_tensors
from vismt.storage.locks import locked

WAIT_S = 60  # seconds to wait for another process that saves into the same folder


def save_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, force: bool = False, strict: bool | None = False
) -> Path:
    """Write the factors of an adapted model, and the parameters of also_train, to a folder.

    Each file appears whole or not at all. A warning names parameters that were trained and are not in the file, such as a head
    beside the adapter.

    Args:
        model: Adapted model.
        folder: Folder to write to. It is made if it is missing.
        name: Name of the adapter if the model carries several. None stands for the active adapter.
        force: Whether to write NaN and infinite values too, for inspection. `load_adapter` refuses such a file.
        strict: Whether to raise an error instead of the warning. None does neither, for a caller that keeps the other trained
            parameters itself.

    Returns:
        The folder.

    Raises:
        UserError: If the model is a stock model or on the meta device, values are not finite, the folder cannot be written, or
            with `strict` trained parameters would not be in the file. Nothing is written then.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], rank=8, also_train=["head"])
        vismt.save_adapter(model, "adapter")
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with active_adapter(model, name, "save_adapter"):
        if strict is not None:
            warn_of_lost(model, "save_adapter", strict)
        return _write(model, Path(folder), force)


def warn_of_lost(model: nn.Module, what: str, strict: bool) -> None:
    """Warn of trained parameters that no file of the adapter holds. With `strict`, raise UserError."""
    record = need_record(model, what)
    modules = adapter_modules(model)
    of_adapter = {name for path, module in modules.items() for name, _ in module.named_parameters(path)}
    lost = []
    for name, value in model.named_parameters():
        known = name in record.frozen
        if not value.requires_grad or value.is_meta or name in record.also_train or (name in of_adapter and not known):
            continue
        if not known or was_trained(record.frozen[name], value):
            lost.append(name)
    if not lost:
        return
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    names = ", ".join(f"'{name}'" for name in lost[:3])
    message = (
        f"{what}: {names}{more} were trained and are not in the file; name them in vismt.adapt(..., also_train=[...]), or save "
        "them yourself."
    )
    if strict:
        raise UserError(message)
    warnings.warn(message, stacklevel=3)


def _write(model: nn.Module, folder: Path, force: bool) -> Path:
    record = need_record(model, "save_adapter")
    tensors = adapter_tensors(model)
    if any(value.is_meta for value in tensors.values()):
        raise UserError("save_adapter: the model is on the meta device, which holds no values to save.")
    # All parameters beside adapter modules count as changed, because a head may be new.
    unchanged = [] if record.specs else unchanged_tensors(record.also_train, tensors)
    if not record.specs:  # the frozen weights identify the base too
        named = dict(model.named_parameters())
        unchanged += [n for n, part in record.frozen.items() if n in named and not was_trained(part, named[n])]
    tensors = {name: value for name, value in tensors.items() if name not in unchanged}
    paths = compared(record.specs, unchanged)
    if not force:  # before the lock, which makes the folder
        need_finite("save_adapter", tensors)
        need_finite("save_adapter", {f"{path}.weight": _base_weight(model, path) for path in paths})
    with locked(folder, WAIT_S):
        digest = write_tensors(folder / "adapter-{digest}.safetensors", tensors)
        description: JsonObject = {
            "format": FORMAT,
            "method": record.method,
            "model": type(model).__name__,
            "options": record.options,
            "sites": [entry_of(spec) for spec in record.layers],
            "also_train": sorted(record.also_train),
            "unchanged": unchanged,
            "parts": module_entries(record.specs),
            "base": weight_fingerprint(model, paths),
            "base_samples": base_samples(model, paths),
            "tensors": f"adapter-{digest[:12]}.safetensors",
            "tensors_sha256": digest,
        }
        atomic_write(folder / DESCRIPTION, sealed(description))
        for stale in set(folder.glob("adapter-*.safetensors")) - {folder / description["tensors"]}:
            stale.unlink()
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", on_other_base: str = "error"
) -> nn.Module:
    """Put a saved adapter on a model as the active adapter.

    If the model already has an adapter of this name and kind, the values go into that adapter.

    Args:
        model: Model with the same base weights, changed in place.
        folder: Folder that `save_adapter` wrote.
        name: Name of the adapter on this model.
        on_other_base: What to do if the fingerprint of the base differs: "error" refuses the adapter, "warn" goes on with a
            warning.

    Returns:
        The model.

    Raises:
        UserError: If a file is damaged, the model is another one, or a tensor is missing, unexpected or of a wrong shape.
            Nothing is changed then.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], rank=8)
        vismt.save_adapter(model, "adapter")
        other = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.load_adapter(other, "adapter")
    """
    carried = name in adapter_names(model)
    with (active_adapter if carried else new_adapter)(model, name, "load_adapter"):
        return _load(model, Path(folder), on_other_base)


def _load(model: nn.Module, folder: Path, on_other_base: str) -> nn.Module:
    refuse_offloaded(model, "load_adapter", whole=True)
    what = f"adapter '{folder}'"
    description, specs, tensors = read_adapter(folder)
    record = record_of(model)
    if record is not None:
        present = record.method, {spec.path: spec for spec in record.specs}, sorted(record.also_train)
        if present != (description.method, {spec.path: spec for spec in specs}, sorted(description.also_train)):
            raise UserError(
                f"{what}: the model already carries another '{record.method}'; unadapt it first, or give another name."
            )
    _check_layers(model, folder, description, specs, tensors)
    unchanged = description.unchanged
    parameters = dict(model.named_parameters())
    paths = compared(specs, [name for name in unchanged if name in parameters])
    samples, base = base_samples(model, paths), weight_fingerprint(model, paths)
    if not same_base(samples, description.base_samples):
        made_for = f"{description.model} (weights {description.base})"
        other_base(f"{what} was made for {made_for}, this is {type(model).__name__} (weights {base})", on_other_base)
    _check_tensors(model, what, description, specs, tensors)
    if record is not None:
        fill_adapter(model, tensors, what)
        fill_adapter(model, {name: value for name, value in record.also_train.items() if name in unchanged})
        return model
    install(model, description.method, specs, description.options, description.also_train)
    with undone_on_error(model):
        fill_adapter(model, tensors, what)
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that an adapter file holds, by state_dict key: tensors of adapter modules, and also_train parameters."""
    record = need_record(model, "adapter")
    tensors: dict[str, Tensor] = {}
    for path, module in adapter_modules(model).items():
        tensors.update({f"{path}.{name}": value for name, value in module.tensors().items()})
    return {**tensors, **{name: model.get_parameter(name) for name in record.also_train}}


@torch.no_grad()
def fill_adapter(model: nn.Module, tensors: Mapping[str, Tensor], what: str = "adapter") -> None:
    """Copy checked adapter tensors into an adapted model. Starts that the layers lack are created.

    Raise UserError for values beyond the range of a tensor of this model, before anything is copied.

    what: Start of messages.
    """
    rest, of_modules = dict(tensors), []
    modules = adapter_modules(model)
    for spec in need_record(model, "adapter").specs:
        module = modules[spec.path]
        own = module.tensors()
        names = dict.fromkeys([*own, *module.optional_shapes(spec)])
        values = {name: rest.pop(f"{spec.path}.{name}") for name in names if f"{spec.path}.{name}" in rest}
        for name, value in values.items():  # a tensor that the module lacks gets the dtype of the first one
            check_finite(f"{what}: {spec.path}.{name}", value, own.get(name, next(iter(own.values()))).dtype)
        if values:
            of_modules.append((module, values))
    for name, value in rest.items():
        model.get_parameter(name).copy_(value)
    for module, values in of_modules:
        module.fill(values)


def _base_weight(model: nn.Module, path: str) -> Tensor:
    """Return the weight of a module as it was before the adaptation."""
    record = record_of(model)
    weight = record.also_train.get(f"{path}.weight") if record is not None else None
    if weight is not None:
        return weight
    module = module_at(model, path)
    return module.stock_weight() if isinstance(module, AdapterLayer) else dense_weight(module)


def base_samples(model: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """Return up to 16 values of each of these base weights, at places that depend on the path of the weight.

    A model on the meta device has no values.
    """
    weights = ((path, _base_weight(model, path)) for path in sorted(paths))
    return {path: [] if weight.is_meta else samples_at(path, weight) for path, weight in weights}


def samples_at(path: str, weight: Tensor) -> list[float]:
    """Return 16 values of the weight of the module at `path`, at places that depend on the path."""
    flat = weight.flatten()
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
    places = torch.randint(flat.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(seed))
    return flat[places.to(flat.device)].double().tolist()


def other_base(message: str, on_other_base: str) -> None:
    """Raise UserError with `message`. If on_other_base is "warn", give a warning instead."""
    if on_other_base != "warn":
        raise UserError(f"{message}. Load the base it was trained on, or pass on_other_base='warn'.")
    warnings.warn(message, stacklevel=3)


def same_base(samples: Mapping[str, list[float]], saved: Mapping[str, list[float]]) -> bool:
    """Return whether samples agree within 1 % of the largest sample of each weight. bf16 rounds by at most 0.4 % of a value.

    Samples that are NaN agree with nothing. A weight that has samples on one side only is not compared.
    """
    for path, values in samples.items():
        expected = saved.get(path, [])
        largest = max((abs(value) for value in expected), default=0.0)
        if values and expected and not all(abs(a - b) <= 0.01 * largest for a, b in zip(values, expected, strict=True)):
            return False
    return True


def weight_fingerprint(model: nn.Module, paths: Iterable[str]) -> str:
    """Return the weight fingerprint for messages and records: twelve hex digits made from the samples at `paths`."""
    return hashlib.sha256(json.dumps(base_samples(model, paths)).encode()).hexdigest()[:12]


def _check_layers(
    model: nn.Module, folder: Path, description: Description, specs: Iterable[LayerSpec], tensors: Mapping[str, Tensor]
) -> None:
    """Raise UserError unless the model has every adapted weight, with the right shape, and can compute an update of it."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    made_for = f"adapter '{folder}' was made for {description.model}, this model is {type(model).__name__}"
    layers = [spec for spec in specs if spec.has_weight]
    for spec in layers:
        module = modules.get(spec.path)
        if spec.kind == "parameter" and spec.path in parameters:
            module = module_at(model, spec.path)
        shape = None
        if isinstance(module, AdapterLayer):
            shape = (module.out_features, module.in_features)
        elif module is not None and kind_of(module) in (LINEAR if spec.kind in LINEAR else (spec.kind,)):
            shape = matrix_shape(module)
        if shape is None:
            raise UserError(f"{made_for} (it has no linear or convolution '{spec.path}' of kind {spec.kind}).")
        if shape != spec.shape:
            raise UserError(f"{made_for} ({spec.layer.shape_mismatch(spec, shape, tensors)}).")
    if record_of(model) is None:
        prequantized = all(spec.layer.takes_prequantized for spec in layers)
        readable = all(spec.layer.weight_readable for spec in layers)
        for reason in target_refusals(model, [spec.path for spec in layers], prequantized, readable=readable).values():
            raise UserError(f"adapter '{folder}': {reason}.")


def _check_tensors(
    model: nn.Module, what: str, description: Description, specs: Iterable[LayerSpec], tensors: Mapping[str, Tensor]
) -> None:
    """Raise UserError for tensors that are missing, unexpected or of a wrong shape, and for values that the model cannot take."""
    needed = layer_shapes((spec for spec in specs if spec.has_weight), tensors)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    others = [(spec, spec.layer.shapes_on(modules.get(spec.path), spec)) for spec in specs if not spec.has_weight]
    for spec, shapes in others:
        needed |= {f"{spec.path}.{name}": shape for name, shape in shapes.items()}
    for name in description.also_train:
        if name not in parameters:
            raise UserError(f"{what}: this model has no parameter '{name}' to load.")
        if name not in description.unchanged:
            needed[name] = tuple(parameters[name].shape)
    check_tensors(what, needed, tensors)
    for spec, shapes in others:
        values = {name: tensors[f"{spec.path}.{name}"] for name in shapes}
        spec.layer.check_tensors(f"{what}: {spec.path}", spec, values)
    for name in tensors.keys() & parameters.keys() & set(description.also_train):
        check_parameter(f"{what}: {name}", tensors[name], parameters[name])
