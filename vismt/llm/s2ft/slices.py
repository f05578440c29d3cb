"""S2FT adapters on a stock model: read, add, switch, and serve several at once (arXiv 2412.06289, section on inference).

    switch   W[:, J] += delta (o, d) or W[J] += delta (v, u): k columns or rows are written, without a matrix product
    serve    y = x W^T (one GEMM for all requests) + gather(x, J_r) delta_r^T (o, d), or scattered into J_r (v, u),
             with a separate adapter for each request r of the batch

A switch keeps a copy of the values that it overwrites, because adding and subtracting again does not restore the same bits; the
next switch starts from the base. Features are in the order of the base, so adapters of any mode and selection can be combined;
on disjoint units a sum of adapters is their union. Do not train or adapt a switched model: the next switch overwrites the
changes with the kept values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.llm.s2ft.layer import SliceLinear
from vismt.lowrank.files.description import read_adapter
from vismt.lowrank.files.store import base_samples, other_base, same_base
from vismt.lowrank.layers.stock_modules import is_conv1d, kind_of, matrix_shape
from vismt.lowrank.model.record import refuse_adapted, refuse_switched


@dataclass(frozen=True, eq=False)
class Slice:
    """A change of some rows (dim 0) or columns (dim 1) of a weight (o, i).

    index: (k,) int64, the rows or columns. delta: (k, i) or (o, k) fp32. base: samples of the weight that the change was
    trained on (`store.base_samples`), empty where they are unknown.
    """

    dim: int
    index: Tensor
    delta: Tensor
    base: tuple[float, ...] = ()


Slices = Mapping[str, Slice]
SliceValues = dict[str, tuple[int, Tensor, Tensor]]  # path -> (dim, index, values)
SWITCHED = "vismt_switched"  # attribute of a switched model with the base values that the switch replaced


def read_slices(folder: str | Path) -> dict[str, Slice]:
    """Return the changes {module path: Slice} of an S2FT adapter that `save_adapter` wrote.

    Raises UserError for an adapter of another method or with also_train, and for tensors that are missing or misshapen.
    """
    description, specs, tensors = read_adapter(Path(folder))
    others = [spec for spec in specs if spec.layer is not SliceLinear]
    if not specs or others or description.also_train:
        addition = " with also_train" if description.also_train else ""
        raise UserError(
            f"adapter '{folder}': method '{description.method}'{addition}; only an 's2ft' without also_train consists "
            "of slices alone: use load_adapter."
        )
    slices = {}
    for spec in specs:
        values = {name: tensors[f"{spec.path}.{name}"] for name in spec.layer.tensor_shapes(spec)}
        delta = values["slice_values"].float()
        if "slice_start" in values:
            delta = delta - values["slice_start"].float()
        samples = description.base_samples[spec.path]
        slices[spec.path] = Slice(spec.settings.dim, values["slice_index"], delta, tuple(samples))
    return slices


def add_slices(adapters: Sequence[Slices], weights: Sequence[float] | None = None) -> dict[str, Slice]:
    """Return the weighted sum of adapters: the union of their features, added where they overlap.

    Args:
        adapters: from `read_slices`.
        weights: a factor for each adapter, 1 where None.

    Raises:
        UserError: different numbers of adapters and weights, or adapters for different shapes or base weights.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters):
        raise UserError(f"add_slices: {len(adapters)} adapters and {len(weights)} weights; give one weight for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"add_slices: the weights {weights} are not finite numbers.")
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    return {
        path: _weighted_sum(
            path, [(weight, adapter[path]) for weight, adapter in zip(weights, adapters) if path in adapter]
        )
        for path in paths
    }


def _weighted_sum(path: str, terms: Sequence[tuple[float, Slice]]) -> Slice:
    """Return the weighted sum of slices of one module."""
    first = terms[0][1]
    dim = first.dim
    if any(term.dim != dim or term.delta.shape[1 - dim] != first.delta.shape[1 - dim] for _, term in terms):
        raise UserError(
            f"add_slices: '{path}' has slices of different shapes in these adapters; they are for different models."
        )
    bases = [term.base for _, term in terms if term.base]
    if any(not same_base({path: list(base)}, {path: list(bases[0])}) for base in bases):
        raise UserError(
            f"add_slices: '{path}': these adapters were made for different weights; add those of the same base."
        )
    index, positions = torch.cat([term.index for _, term in terms]).unique(return_inverse=True)
    deltas = torch.cat([weight * term.delta for weight, term in terms], dim)
    shape = list(deltas.shape)
    shape[dim] = len(index)
    return Slice(dim, index, torch.zeros(shape).index_add_(dim, positions, deltas), bases[0] if bases else ())


@torch.no_grad()
def switch(model: nn.Module, slices: Slices | None, *, on_other_base: str = "error") -> nn.Module:
    """Replace the changes of the last switch in the weights of a stock model by `slices`.

    `adapt` and `load_adapter` refuse a switched model.

    Args:
        model: a stock model, changed in place.
        slices: the changes by module path; None restores the base weights, bit for bit.
        on_other_base: "error" raises where the slices were trained on other weights, "warn" warns and continues.

    Returns:
        The model.

    Raises:
        UserError: the slices do not fit the model or were trained on other weights; the model is then unchanged.
    """
    refuse_adapted(model, "switch")
    _check(model, slices or {})
    switched = _put(model, getattr(model, SWITCHED, {}))
    try:
        _check_base(model, slices or {}, on_other_base)
    except BaseException:
        _put(model, switched)
        raise
    changed = {}
    for path, change in (slices or {}).items():
        weight = _matrix(model, path)
        base = weight.index_select(change.dim, change.index.to(weight.device))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        changed[path] = (change.dim, change.index, base.to(dtype) + change.delta.to(weight.device, dtype))
    setattr(model, SWITCHED, _put(model, changed))
    return model


def _put(model: nn.Module, values: SliceValues) -> SliceValues:
    """Write values into the weights and return the values they replace."""
    replaced = {}
    for path, (dim, index, new) in values.items():
        weight = _matrix(model, path)
        position = index.to(weight.device)
        replaced[path] = (dim, index, weight.index_select(dim, position))
        weight.index_copy_(dim, position, new.to(weight))
    return replaced


@contextmanager
def serving(
    model: nn.Module, adapters: Sequence[Slices], which: Tensor, *, on_other_base: str = "error"
) -> Iterator[None]:
    """Within the block, apply a separate adapter to each sample of a batch.

    Args:
        model: a stock model; the inputs of its adapted linear layers are (b, ..., i).
        adapters: from `read_slices`; they may differ in modules and numbers of units.
        which: (b,) int64, the number of the adapter for each sample, -1 for the base.
        on_other_base: as in `switch`.

    Raises:
        UserError: a number outside [-1, len(adapters)), or slices that do not fit the model or its weights.
    """
    refuse_adapted(model, "serving")
    refuse_switched(model, "serving")
    if not adapters or which.ndim != 1 or not (int(which.min()) >= -1 and int(which.max()) < len(adapters)):
        raise UserError(
            f"serving: which must be (b,) with numbers from -1 to {len(adapters) - 1}, one for each sample."
        )
    for adapter in adapters:
        _check(model, adapter)
        _check_base(model, adapter, on_other_base)
    with ExitStack() as stack:
        for path in dict.fromkeys(path for adapter in adapters for path in adapter):
            handle = model.get_submodule(path).register_forward_hook(_serving_hook(model, path, adapters, which))
            stack.callback(handle.remove)
        yield


def _serving_hook(model: nn.Module, path: str, adapters: Sequence[Slices], which: Tensor) -> Callable:
    """Return a forward hook that adds the contribution of each sample's adapter to the output of a linear layer."""
    weight = _matrix(model, path)
    changes = [adapter.get(path) for adapter in adapters]
    dim = next(change.dim for change in changes if change is not None)
    most = max(len(change.index) for change in changes if change is not None)
    index = torch.zeros(len(changes) + 1, most, dtype=torch.int64)  # the last adapter is the base: zeros
    delta = torch.zeros(len(changes) + 1, most, weight.shape[1 - dim])
    for number, change in enumerate(changes):
        if change is not None:
            index[number, : len(change.index)] = change.index
            delta[number, : len(change.index)] = change.delta if dim == 0 else change.delta.t()
    index, delta = index.to(weight.device)[which], delta.to(weight)[which]  # (b, k), (b, k, i or o)

    def add(_module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        x = inputs[0]
        if len(x) != len(which):
            raise UserError(f"serving: a batch of {len(x)} samples, which names adapters for {len(which)}.")
        flat = x.reshape(len(x), -1, x.shape[-1])  # (b, n, i)
        result = out.reshape(len(x), -1, out.shape[-1])
        factors = delta.to(out.dtype)
        positions = index[:, None].expand(-1, flat.shape[1], -1)  # (b, n, k)
        if dim == 1:
            result = torch.baddbmm(result, flat.gather(2, positions).to(out.dtype), factors)
        else:
            result = result.scatter_add(2, positions, flat.to(out.dtype) @ factors.mT)
        return result.view(out.shape)

    return add


def _matrix(model: nn.Module, path: str) -> Tensor:
    """Return a view (o, i) of the weight."""
    module = model.get_submodule(path)
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def _check(model: nn.Module, slices: Slices) -> None:
    """Raise UserError for slices of a layer that the model lacks or that has another shape."""
    modules = dict(model.named_modules())
    for path, change in slices.items():
        if kind_of(modules.get(path)) not in ("linear", "conv1d"):
            raise UserError(f"slices: {type(model).__name__} has no linear '{path}' to change.")
        shape = matrix_shape(modules[path])
        dim = change.dim
        if change.delta.shape[1 - dim] != shape[1 - dim] or int(change.index.max()) >= shape[dim]:
            raise UserError(
                f"slices: '{path}': the change is {tuple(change.delta.shape)}, the weight {shape}: another model."
            )


def _check_base(model: nn.Module, slices: Slices, on_other_base: str) -> None:
    """Apply `on_other_base` unless the weights, without a switch, are those that the slices were trained on."""
    expected = {path: list(change.base) for path, change in slices.items() if change.base}
    samples = base_samples(model, expected)
    different = [path for path in expected if not same_base({path: samples[path]}, expected)]
    if different:
        message = f"slices: made for other weights than those of this {type(model).__name__} ('{different[0]}')"
        other_base(message, on_other_base)
