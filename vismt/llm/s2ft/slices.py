"""S2FT adapters on a stock model: a switch writes k columns or rows of each weight (arXiv 2412.06289, on inference).

    W[:, J] += delta (o, d)   or   W[J] += delta (v, u)        no matrix product is needed

A switch keeps a copy of the values that it overwrites, because adding and subtracting again does not restore the same bits. The
next switch starts from the base. Do not train or adapt a switched model: the next switch overwrites the changes with the kept
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.llm.s2ft.layer import SliceLinear, saved_change
from vismt.llm.s2ft.structures import weight_matrix
from vismt.lowrank.files.description import read_adapter
from vismt.lowrank.files.save_load import base_samples, other_base, same_base
from vismt.lowrank.layers.stock_modules import kind_of, matrix_shape
from vismt.lowrank.model.record import refuse_adapted


@dataclass(frozen=True, eq=False)
class Slice:
    """A change of some rows (dim 0) or columns (dim 1) of a weight (o, i).

    index: Rows or columns int64 (k,). delta: Change (k, i) or (o, k) fp32. base: Samples of the weight that the change was
    trained on (`save_load.base_samples`). Empty if they are unknown.
    """

    dim: int
    index: Tensor
    delta: Tensor
    base: tuple[float, ...] = ()


Slices = Mapping[str, Slice]
SWITCHED = "vismt_switched"  # attribute of a switched model, with the base values that the switch replaced


def read_slices(folder: str | Path) -> dict[str, Slice]:
    """Return the changes {module path: Slice} of an S2FT adapter that `save_adapter` wrote.

    Raise UserError for an adapter of another method or with also_train, and for tensors that are missing or of a wrong shape.
    """
    description, specs, tensors = read_adapter(Path(folder))
    others = [spec for spec in specs if spec.layer is not SliceLinear]
    if not specs or others or description.also_train:
        addition = " with also_train" if description.also_train else ""
        raise UserError(
            f"adapter '{folder}': method '{description.method}'{addition}; slices can be "
            "switched only for an 's2ft' without also_train; use load_adapter."
        )
    slices = {}
    for spec in specs:
        names = {f"{spec.path}.{name}": name for name in ("slice_index", "slice_values", "slice_start")}
        own = {name: tensors[key] for key, name in names.items() if key in tensors}
        samples = description.base_samples[spec.path]
        slices[spec.path] = Slice(spec.settings.dim, own["slice_index"], saved_change(own).float(), tuple(samples))
    return slices


@torch.no_grad()
def switch(model: nn.Module, adapter: Slices | str | Path | None, *, on_other_base: str = "error") -> nn.Module:
    """Replace the changes of the last switch in the weights of a stock model by the changes of `adapter`.

    `adapt` and `load_adapter` refuse a switched model.

    Args:
        model: Stock model, changed in place.
        adapter: Folder of an S2FT adapter, or what `read_slices` read from it. None restores the base weights, bit for bit.
        on_other_base: What to do if the adapter was trained on other weights: "error" raises, "warn" warns and continues.

    Returns:
        The model.

    Raises:
        UserError: If the adapter does not fit the model or was trained on other weights. The model is then unchanged.
    """
    refuse_adapted(model, "switch")
    slices: Slices = read_slices(adapter) if isinstance(adapter, str | Path) else (adapter or {})
    modules = dict(model.named_modules())
    for path, change in slices.items():
        if path not in modules or kind_of(modules[path]) not in ("linear", "conv1d"):
            raise UserError(f"slices: {type(model).__name__} has no linear '{path}' to change.")
        shape, dim = matrix_shape(modules[path]), change.dim
        if change.delta.shape[1 - dim] != shape[1 - dim] or int(change.index.max()) >= shape[dim]:
            raise UserError(
                f"slices: '{path}': the change is {tuple(change.delta.shape)}, the weight {shape}: another model."
            )
    switched = _put(model, getattr(model, SWITCHED, {}))
    try:
        expected = {path: list(change.base) for path, change in slices.items() if change.base}
        samples = base_samples(model, expected)
        different = [path for path in expected if not same_base({path: samples[path]}, expected)]
        if different:
            message = f"slices: made for other weights than this {type(model).__name__} has ('{different[0]}')"
            other_base(message, on_other_base)
    except BaseException:
        _put(model, switched)
        raise
    changed = {}
    for path, change in slices.items():
        weight = weight_matrix(modules[path])
        base = weight.index_select(change.dim, change.index.to(weight.device))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        changed[path] = (change.dim, change.index, base.to(dtype) + change.delta.to(weight.device, dtype))
    setattr(model, SWITCHED, _put(model, changed))
    return model


def _put(model: nn.Module, values: Mapping[str, tuple[int, Tensor, Tensor]]) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Write {path: (dim, index, values)} into the weights. Return the replaced values in the same form."""
    replaced = {}
    for path, (dim, index, new) in values.items():
        weight = weight_matrix(model.get_submodule(path))
        position = index.to(weight.device)
        replaced[path] = (dim, index, weight.index_select(dim, position))
        weight.index_copy_(dim, position, new.to(weight))
    return replaced
