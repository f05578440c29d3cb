"""Several named adapters on one model. One is active at a time. The others are on the shelf.

Every update is relative to the stock weights, even with a principal start, so a model can carry adapters of any methods
together. With one active adapter the model is the same as with that adapter alone. It has the same layers, and compiled code
has the same graph for adapters of equal shapes. The base stays frozen while a model carries adapters.

The adapters that are not active are in the submodule `vismt_parked`. Shelving an adapter repeats the steps of undoing it, and
restoring an adapter repeats the steps of placing it, so that every adapter finds the stock modules and weights that it was made
for. The parameters stay the same objects, which optimisers know, and so do the adapter modules. State dicts and conversions of
the model reach shelved tensors. The tensors of active adapters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, adapter_modules
from vismt.lowrank.layers.parameter_modules import to_modules
from vismt.lowrank.model.merge import freeze, undo, unfreeze, watch_saving
from vismt.lowrank.model.modules import attach_modules, prepare_modules
from vismt.lowrank.model.record import (
    RECORD,
    SHELF,
    AdaptRecord,
    adapter_names,
    need_record,
    record_of,
    refuse_offloaded,
)


def activate(model: nn.Module, name: str | None) -> nn.Module:
    """Choose the adapter that the model computes with. The others stay on the model, at no cost.

    Args:
        model: Model with adapters, changed in place.
        name: Name of the adapter. None for the stock model.

    Returns:
        The model.

    Raises:
        UserError: If the name is unknown. The model is then unchanged.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], name="birds")
        vismt.adapt(model, "pissa", targets=["fc1"], name="flowers")
        vismt.activate(model, "birds")
    """
    if not adapter_names(model):
        need_record(model, "activate")
    if name is not None and not isinstance(name, str):
        raise UserError(
            f"activate: {shown_value(name)}; give one name, or None. vismt.lowrank.combine adds the updates of several adapters."
        )
    if name is not None:
        _need(model, name, "activate")
    before = active(model)
    if name != before:
        refuse_offloaded(model, "activate")
        try:
            _start(model, name)
        except BaseException:
            _start(model, before)
            raise
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Let the model compute without its adapters inside the block: `with vismt.disabled(model):`.

    Args:
        model: Model with adapters. After the block, the same adapters are active again, with their parameters and gradients.
            The block may stand between a forward and its backward pass, as the reference model of preference training does.

    Raises:
        UserError: If the model is a stock model, or the block contains the backward pass of a forward before it.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"])
        images = torch.rand(2, 3, *model.patch_embed.img_size)
        with vismt.disabled(model):
            before = model(images)
    """
    before = active(model)
    refusal = UserError("disabled: a backward pass in the block is of a forward before it; call it after the block.")

    # the parameters take no gradient here, and the gradient would be lost without a word
    def refuse(_: torch.Tensor) -> None:
        raise refusal

    tensors = [value for value in (*model.parameters(), *model.buffers()) if not value.is_inference()]
    kept = [torch.autograd._unsafe_preserve_version_counter(value) for value in tensors]
    hooks = [value.register_hook(refuse) for value in tensors if value.requires_grad]
    inside: list[int] = []
    try:
        activate(model, None)
        inside = [value._version for value in tensors]
        yield model
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise refusal from error
    finally:
        for hook in hooks:
            hook.remove()
        unwritten = [version for version, value, count in zip(kept, tensors, inside) if value._version == count]
        activate(model, before)
        for version in unwritten:  # the values are back, bit for bit, so a graph from before the block is valid again
            with version:
                pass


def remove(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off the model. The other adapters stay.

    Args:
        model: Model, changed in place. Without its last adapter it is the stock model again, with its gradient flags.
        name: Name of the adapter.

    Returns:
        The model.

    Raises:
        UserError: If the name is unknown. Nothing is changed then.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], name="birds")
        vismt.remove(model, "birds")
    """
    _need(model, name, "remove")
    refuse_offloaded(model, "remove")
    if name == active(model):
        activate(model, None)
    record = _take(model, name).record
    if not adapter_names(model):
        unfreeze(model, record)
    return model


def unadapt(model: nn.Module) -> nn.Module:
    """Restore the original modules, weights (bit for bit) and gradient flags. Every adapter of the model is removed.

    Args:
        model: Adapted model, changed in place.

    Returns:
        The model.

    Raises:
        UserError: If the model is a stock model.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"])
        vismt.unadapt(model)
    """
    names = adapter_names(model)
    if not names:
        need_record(model, "unadapt")
    for name in names:
        remove(model, name)
    return model


def active(model: nn.Module) -> str | None:
    """Return the name of the active adapter."""
    record = record_of(model)
    return record.name if record is not None else None


@contextmanager
def active_adapter(model: nn.Module, name: str | None, what: str) -> Iterator[None]:
    """Make the adapter `name` the active one inside the block. None leaves the active adapter."""
    before = active(model)
    if name is not None:
        _need(model, name, what)
        activate(model, name)
    try:
        yield
    finally:
        if name is not None:
            activate(model, before)


@contextmanager
def new_adapter(model: nn.Module, name: str, what: str) -> Iterator[None]:
    """Let the block place a new adapter, `name`, on the stock model. On an error the model is as it was before."""
    names, before = adapter_names(model), active(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"{what}.name: {shown_value(name)}; give a text.")
    same = next((other for other in names if key(other) == key(name)), None)
    if same is not None:
        record = need_record(model, what) if before == same else shelved(model)[same].record
        raise UserError(
            f"{what}: the model already carries '{record.method}' as adapter '{same}'; remove it first, or give another name."
        )
    _start(model, None)
    others, shelf = list(shelved(model).values()), model._modules.pop(SHELF, None)
    try:
        if others:
            unfreeze(model, others[0].record)
        yield
        need_record(model, what).name = name
    except BaseException:
        if record_of(model) is not None:
            undo(model)
        if shelf is not None:
            freeze(model)
            model._modules[SHELF] = shelf
            _start(model, before)
        raise
    if shelf is not None:
        model._modules[SHELF] = shelf


def _need(model: nn.Module, name: str, what: str) -> None:
    require_known(f"{what}: the model has no adapter", [name], adapter_names(model))


def _start(model: nn.Module, name: str | None) -> None:
    """Shelve the active adapter, and make another one active."""
    if record_of(model) is not None:
        shelve(model)
    if name is not None:
        unshelve(model, name)


# ---- the shelf
class ShelvedAdapter(nn.Module):
    """An adapter apart from its model. It has the tensors of its modules in submodules, and whole parameters as buffers.

    record: Record that the model has for an active adapter. adapter_modules: Adapter modules by path. trained: Names of the
    parameters that require a gradient while the adapter is active.
    """

    def __init__(
        self, record: AdaptRecord, modules: dict[str, AdapterModule], also_train: dict[str, Tensor], trained: set[str]
    ) -> None:
        super().__init__()
        self.record, self.adapter_modules, self.trained = record, modules, trained
        for path, module in modules.items():
            self._modules[key(path)] = _mirror(module)
        for name, value in also_train.items():
            self.register_buffer(key(name), value)
        self.requires_grad_(False)


class Shelf(nn.Module):
    """The shelved adapters of a model, by name.

    The forward returns its input, because an nn.Sequential calls every child.
    """

    def forward(self, x: object) -> object:
        return x


def key(name: str) -> str:
    """Return a name without dots, which names inside a module cannot have.

    It is a path, or the name of a parameter or an adapter.
    """
    return name.replace(".", "/")


def _mirror(module: nn.Module) -> nn.Module:
    """Return a module that shares the tables of tensors of `module` and its children."""
    mirror = nn.Module()
    mirror._parameters, mirror._buffers = module._parameters, module._buffers
    mirror._non_persistent_buffers_set = module._non_persistent_buffers_set
    for name, child in module.named_children():
        mirror._modules[name] = _mirror(child)
    return mirror


def shelve(model: nn.Module) -> None:
    """Move the active adapter to the shelf. The stock model is left with every parameter frozen."""
    record = need_record(model, "shelve")
    shelf = model._modules.pop(SHELF, None)  # undoing must not see the shelf
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    also_train = {name: model.get_parameter(name).detach().clone() for name in record.also_train}
    modules = adapter_modules(model)
    undo(model)
    freeze(model)
    shelf = shelf if shelf is not None else Shelf()
    shelf._modules[key(record.name)] = ShelvedAdapter(record, modules, also_train, trained)
    model._modules[SHELF] = shelf


@torch.no_grad()
def unshelve(model: nn.Module, name: str) -> None:
    """Make a shelved adapter the active one of a model without an active adapter. This is the inverse of `shelve`."""
    specs = shelved(model)[name].record.specs
    finish = prepare_modules(model, specs)
    adapter = _take(model, name)

    def adopted(spec: LayerSpec, base: nn.Module | None) -> AdapterModule:
        module = adapter.adapter_modules[spec.path]
        module.train((model if base is None else base).training)  # the mode may have changed meanwhile
        module.adopt(base)
        return module

    to_modules(model, [spec.path for spec in specs if spec.has_weight])
    finish(attach_modules(model, specs, adopted))
    for whole in adapter.record.also_train:
        model.get_parameter(whole).copy_(adapter.get_buffer(key(whole)))
    setattr(model, RECORD, adapter.record)
    watch_saving(model)
    for whole, parameter in model.named_parameters():
        parameter.requires_grad_(whole in adapter.trained)


def _take(model: nn.Module, name: str) -> ShelvedAdapter:
    """Take an adapter off the shelf. Take an empty shelf off the model."""
    shelf: Any = model._modules[SHELF]
    adapter = shelf._modules.pop(key(name))
    if not shelf._modules:
        del model._modules[SHELF]
    return adapter


def shelved(model: nn.Module) -> dict[str, ShelvedAdapter]:
    """Return the adapters on the shelf by name."""
    shelf: Any = model._modules.get(SHELF)
    return {} if shelf is None else {adapter.record.name: adapter for adapter in shelf.children()}
