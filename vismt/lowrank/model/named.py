"""Several adapters on one model: named, one active at a time, or several together (mixed.py).

Every update is relative to the stock weights, a principal start included, so adapters of any method can be carried together.
With one active adapter the model is what it is with that adapter alone: the same layers, and compiled code of the same graph
for adapters of equal shapes. The base stays frozen while a model carries adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vismt.base.errors import UserError, require_known
from vismt.lowrank.model.inject import restore_flags, undo
from vismt.lowrank.model.mixed import mix, mixed_names, unmix
from vismt.lowrank.model.parked import key, park, parked_adapters, put_back, take
from vismt.lowrank.model.record import SHELF, names_of, need_record, record_of, refuse_offloaded


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
    record = take(model, name).record
    if not names_of(model):
        restore_flags(model, record)
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
def using(model: nn.Module, name: str | None, what: str) -> Iterator[None]:
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
def beside(model: nn.Module, name: str, what: str) -> Iterator[None]:
    """Let the block place a new adapter, `name`, on the stock model; on an error the model is as it was before."""
    names, before = names_of(model), active(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"{what}.name: {name!r}; give a text.")
    same = next((other for other in names if key(other) == key(name)), None)
    if same is not None:
        record = need_record(model, what) if before == same else parked_adapters(model)[same].record
        raise UserError(
            f"{what}: the model already carries '{record.method}' as adapter '{same}'; remove it first, or give another name."
        )
    _deactivate(model)
    parked, shelf = list(parked_adapters(model).values()), model._modules.pop(SHELF, None)
    try:
        if parked:
            restore_flags(model, parked[0].record)
        yield
        need_record(model, what).name = name
    except BaseException:
        if record_of(model) is not None:
            undo(model)
        if shelf is not None:
            model.requires_grad_(False)
            model._modules[SHELF] = shelf
            _start(model, before)
        raise
    if shelf is not None:
        model._modules[SHELF] = shelf


def _need(model: nn.Module, names: Sequence[str], what: str) -> None:
    require_known(f"{what}: the model has no adapter", names, names_of(model))


def _deactivate(model: nn.Module) -> None:
    """Park the active adapters."""
    if record_of(model) is not None:
        park(model)
    elif mixed_names(model):
        unmix(model)


def _start(model: nn.Module, names: str | list[str] | None) -> None:
    """Activate parked adapters of a model without active ones."""
    if isinstance(names, str):
        put_back(model, names)
    elif names:
        mix(model, names)
