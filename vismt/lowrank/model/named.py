"""Several adapters on one model: named, one active at a time or several together (mixed.py), the others on the shelf.

Every update is relative to the stock weights, a principal start included, so adapters of any method can be carried together.
With one active adapter the model is what it is with that adapter alone: the same layers, and compiled code of the same graph
for adapters of equal shapes. The base stays frozen while a model carries adapters.

The adapters that are not active lie in the submodule `vismt_parked`. Shelving an adapter repeats the steps of undoing it, and
restoring it those of placing one, so that every adapter finds the stock modules and weights that it was made for. The
parameters stay the same objects, which optimisers know, and so do the adapter modules. State dicts and conversions of the model
reach shelved tensors; those of active ones keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, adapter_modules
from vismt.lowrank.layers.parameter_modules import to_modules
from vismt.lowrank.model.merge import freeze, undo, unfreeze, unwatch_saving, watch_saving
from vismt.lowrank.model.modules import place, prepare
from vismt.lowrank.model.record import RECORD, SHELF, AdaptRecord, names_of, need_record, record_of, refuse_offloaded


def activate(model: nn.Module, names: str | Sequence[str] | None) -> nn.Module:
    """Let the named adapters be those that the model computes with; the others stay on it, without cost.

    Args:
        model: a model with adapters, changed in place.
        names: one name, of the adapter that trains; a list of names, whose updates are added, or chosen for each sample
            inside `adapters_per_sample`, both without training; None for the stock model.

    Returns:
        The model.

    Raises:
        UserError: for an unknown name, and for a list with an adapter that cannot be mixed (a router that routes, quantised
            weights, parameters trained whole outside of linears); the model is then unchanged.
    """
    if not names_of(model):
        need_record(model, "activate")
    wanted = names if isinstance(names, str) else list(names or []) or None
    _need(model, [wanted] if isinstance(wanted, str) else wanted or [], "activate")
    if isinstance(wanted, list) and len(set(wanted)) < len(wanted):
        raise UserError(f"activate: {', '.join(wanted)}: a name is given twice.")
    before = active(model)
    if wanted != before:
        refuse_offloaded(model, "activate")
        _deactivate(model)
        try:
            _start(model, wanted)
        except BaseException:
            _start(model, before)
            raise
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Let the model compute without its adapters inside the block: `with vismt.disabled(model):`.

    Args:
        model: a model with adapters. Afterwards those that were active are active again, their parameters and gradients kept.
            The block may stand between a forward and its backward pass, as a reference model of preference training does.

    Raises:
        UserError: for a stock model, and for a backward pass in the block of a forward before it.
    """
    before = active(model)
    refusal = UserError("disabled: a backward pass in the block is of a forward before it; call it after the block.")

    def refuse(_: torch.Tensor) -> None:  # the parameters take no gradient here, which would be lost in silence
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
        for version in unwritten:  # the values are back, bit for bit: a graph from before the block is right again
            with version:
                pass


def remove(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off the model; the others stay, and those that were active beside it stay active.

    Args:
        model: changed in place. Without its last adapter it is the stock model, gradient flags included.
        name: of the adapter.

    Returns:
        The model.

    Raises:
        UserError: for an unknown name; nothing is changed.
    """
    _need(model, [name], "remove")
    refuse_offloaded(model, "remove")
    before = active(model)
    if before is not None and name in ([before] if isinstance(before, str) else before):
        activate(model, [other for other in before if other != name] if isinstance(before, list) else None)
    record = _take(model, name).record
    if not names_of(model):
        unfreeze(model, record)
    return model


def unadapt(model: nn.Module) -> nn.Module:
    """Restore the original modules, weights (bit for bit) and gradient flags; every adapter of the model is removed.

    Args:
        model: an adapted model; changed in place.

    Returns:
        The model.

    Raises:
        UserError: for a stock model.
    """
    names = names_of(model)
    if not names:
        need_record(model, "unadapt")
    for name in names:
        remove(model, name)
    return model


def active(model: nn.Module) -> str | list[str] | None:
    """Return what `activate` was given last."""
    record = record_of(model)
    return record.name if record is not None else list(mixed_names(model)) or None


@contextmanager
def active_adapter(model: nn.Module, name: str | None, what: str) -> Iterator[None]:
    """Inside the block, let the adapter `name` be the active one; None for the one that is."""
    before = active(model)
    if name is not None:
        _need(model, [name], what)
        activate(model, name)
    try:
        yield
    finally:
        if name is not None:
            activate(model, before)


@contextmanager
def new_adapter(model: nn.Module, name: str, what: str) -> Iterator[None]:
    """Let the block place a new adapter, `name`, on the stock model; on an error the model is as it was before."""
    names, before = names_of(model), active(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"{what}.name: {shown_value(name)}; give a text.")
    same = next((other for other in names if key(other) == key(name)), None)
    if same is not None:
        record = need_record(model, what) if before == same else shelved(model)[same].record
        raise UserError(
            f"{what}: the model already carries '{record.method}' as adapter '{same}'; remove it first, or give another name."
        )
    _deactivate(model)
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


def _need(model: nn.Module, names: Sequence[str], what: str) -> None:
    require_known(f"{what}: the model has no adapter", names, names_of(model))


def _deactivate(model: nn.Module) -> None:
    """Shelve the active adapter, or take the layers of several out."""
    if record_of(model) is not None:
        shelve(model)
    elif mixed_names(model):
        from vismt.lowrank.model.mixed import unmix

        unmix(model)
        model._modules[SHELF].mixed = ()
        unwatch_saving(model)


def _start(model: nn.Module, names: str | list[str] | None) -> None:
    """Activate shelved adapters of a model without active ones."""
    if isinstance(names, str):
        restore(model, names)
    elif names:
        from vismt.lowrank.model.mixed import mix, updates_of  # loaded where adapters are mixed

        updates = []
        for name in names:
            restore(model, name)
            try:
                updates.append(updates_of(model, name))
            finally:
                shelve(model)
        mix(model, names, updates)
        model._modules[SHELF].mixed = tuple(names)
        watch_saving(model)


# ---- the shelf
class ShelvedAdapter(nn.Module):
    """An adapter apart from its model.

    record: what the model has of an active adapter. adapter_modules: by path. trained: names of the parameters that
    require a gradient while it is active. It has the tensors of its modules in submodules, and as buffers the parameters that
    were trained whole.
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
    """The shelved adapters of a model, by name. mixed: the names that are active together (mixed.py).

    The forward returns its input, because an nn.Sequential calls every child.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: tuple[str, ...] = ()

    def forward(self, x: Any) -> Any:
        return x


def key(name: str) -> str:
    """Return a path, or the name of a parameter or an adapter, without the dots that names in a module cannot have."""
    return name.replace(".", "/")


def _mirror(module: nn.Module) -> nn.Module:
    """Return a module with the very tables of tensors that `module` and its children have."""
    mirror = nn.Module()
    mirror._parameters, mirror._buffers = module._parameters, module._buffers
    mirror._non_persistent_buffers_set = module._non_persistent_buffers_set
    for name, child in module.named_children():
        mirror._modules[name] = _mirror(child)
    return mirror


def shelve(model: nn.Module) -> None:
    """Move the active adapter to the shelf, and leave the stock model with every parameter frozen."""
    record = need_record(model, "shelve")
    shelf = model._modules.pop(SHELF, None)  # undoing is not to see it
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    also_train = {name: model.get_parameter(name).detach().clone() for name in record.also_train}
    modules = adapter_modules(model)
    undo(model)
    freeze(model)
    shelf = shelf if shelf is not None else Shelf()
    shelf._modules[key(record.name)] = ShelvedAdapter(record, modules, also_train, trained)
    model._modules[SHELF] = shelf


@torch.no_grad()
def restore(model: nn.Module, name: str) -> None:
    """Make a shelved adapter the active one of a model without an active one: the inverse of `shelve`."""
    specs = shelved(model)[name].record.specs
    finish = prepare(model, specs)
    adapter = _take(model, name)

    def adopted(spec: LayerSpec, base: nn.Module | None) -> AdapterModule:
        module = adapter.adapter_modules[spec.path]
        module.train((model if base is None else base).training)  # the mode may have changed meanwhile
        module.adopt(base)
        return module

    to_modules(model, [spec.path for spec in specs if spec.has_weight])
    finish(place(model, specs, adopted))
    for whole in adapter.record.also_train:
        model.get_parameter(whole).copy_(adapter.get_buffer(key(whole)))
    setattr(model, RECORD, adapter.record)
    watch_saving(model)
    for whole, parameter in model.named_parameters():
        parameter.requires_grad_(whole in adapter.trained)


def _take(model: nn.Module, name: str) -> ShelvedAdapter:
    """Take an adapter off the shelf, and an empty shelf off the model."""
    shelf: Any = model._modules[SHELF]
    adapter = shelf._modules.pop(key(name))
    if not shelf._modules:
        del model._modules[SHELF]
    return adapter


def shelved(model: nn.Module) -> dict[str, ShelvedAdapter]:
    """Return the adapters on the shelf by name."""
    shelf: Any = model._modules.get(SHELF)
    return {} if shelf is None else {adapter.record.name: adapter for adapter in shelf.children()}


def mixed_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are active together."""
    shelf: Any = model._modules.get(SHELF)
    return shelf.mixed if shelf is not None else ()
