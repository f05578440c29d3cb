"""S2FT adapters on a stock model: read, add up, switch, and serve several at once (arXiv 2412.06289, section on inference).

    switch   W[:, J] += delta (o, d) or W[J] += delta (v, u): k columns or rows are written, no product of matrices
    serve    y = x W^T (one GEMM for all requests) + gather(x, J_r) delta_r^T (o, d), or scattered into J_r (v, u),
             where request r of the batch has an adapter of its own

What a switch overwrites is kept and put back, since adding and subtracting again does not give the same bits; the next
switch starts from the base. Features are in the base's order, so adapters of any mode and selection go together; on
disjoint units a sum of adapters is their plain union. While a model is switched it is not to be trained or adapted: what is
kept would come back over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.inject import refuse_adapted, refuse_switched
from vismt.lowrank.store import base_samples, other_base, read_adapter, same_base
from vismt.lowrank.targets import is_conv1d, kind_of, matrix_shape


@dataclass(frozen=True, eq=False)
class Slice:
    """A change of the rows (dim 0) or columns (dim 1) `index` (k,) int64 of a weight (o, i): delta (k, i) or (o, k), fp32.

    base: values of the weight it was made for (`store.base_samples`), empty where they are not known.
    """

    dim: int
    index: Tensor
    delta: Tensor
    base: tuple[float, ...] = ()


Slices = Mapping[str, Slice]


def read_slices(folder: str | Path) -> dict[str, Slice]:
    """The changes of an adapter that `save_adapter` wrote for an S2FT model, by module path; UserError for another one."""
    description, sites, tensors = read_adapter(Path(folder))
    if description["method"] != "s2ft" or description["also_train"]:
        seen = f"method '{description['method']}'" + (" with also_train" if description["also_train"] else "")
        raise UserError(
            f"adapter '{folder}': {seen}; only an 's2ft' without also_train is slices alone: use load_adapter."
        )
    found = {}
    for site in sites:
        own = {name: tensors.get(f"{site.path}.{name}") for name in site.tensors()}
        if any(value is None or tuple(value.shape) != site.tensors()[name] for name, value in own.items()):
            raise UserError(
                f"adapter '{folder}': the tensors of '{site.path}' are missing or misshapen; save it again."
            )
        delta = own["slice_values"].float()
        if "slice_start" in own:
            delta = delta - own["slice_start"].float()
        samples = description["base_samples"].get(site.path, ())
        found[site.path] = Slice(int(site.dim), own["slice_index"], delta, tuple(samples))
    return found


def add_slices(adapters: Sequence[Slices], weights: Sequence[float] | None = None) -> dict[str, Slice]:
    """The sum of `weights[j]` (1 each) times adapter j: the union of their features, added where they overlap."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters):
        raise UserError(f"add_slices: {len(adapters)} adapters and {len(weights)} weights; give one weight for each.")
    found = {}
    for path in dict.fromkeys(path for one in adapters for path in one):
        own = [(weight, one[path]) for weight, one in zip(weights, adapters) if path in one]
        dim = own[0][1].dim
        if any(one.dim != dim or one.delta.shape[1 - dim] != own[0][1].delta.shape[1 - dim] for _, one in own):
            raise UserError(
                f"add_slices: '{path}' has slices of other shapes in these adapters; they are for other models."
            )
        bases = [one.base for _, one in own if one.base]
        if any(not same_base({path: list(base)}, {path: list(bases[0])}) for base in bases):
            raise UserError(
                f"add_slices: '{path}': these adapters were made for different weights; add those of one base."
            )
        index, places = torch.cat([one.index for _, one in own]).unique(return_inverse=True)
        parts = torch.cat([weight * one.delta for weight, one in own], dim)
        shape = list(parts.shape)
        shape[dim] = len(index)
        found[path] = Slice(dim, index, torch.zeros(shape).index_add_(dim, places, parts), bases[0] if bases else ())
    return found


@torch.no_grad()
def switch(model: nn.Module, slices: Slices | None, *, on_other_base: str = "error") -> nn.Module:
    """Put these changes into the weights of a stock model instead of those of the last switch; None: the base, bit for bit.

    Returns the model. UserError, and nothing is changed, where they do not fit or were made for other weights;
    on_other_base="warn" goes on with a warning then. `adapt` and `load_adapter` refuse a model that is switched.
    """
    refuse_adapted(model, "switch")
    _check(model, slices or {})
    present = _put(model, getattr(model, "vismt_switched", {}))
    try:
        _check_base(model, slices or {}, on_other_base)
    except BaseException:
        _put(model, present)
        raise
    changed = {}
    for path, one in (slices or {}).items():
        weight = _matrix(model, path)
        kept = weight.index_select(one.dim, one.index.to(weight.device))
        kind = torch.promote_types(weight.dtype, torch.float32)
        changed[path] = (one.dim, one.index, kept.to(kind) + one.delta.to(weight.device, kind))
    model.vismt_switched = _put(model, changed)
    return model


def _put(model: nn.Module, values: Mapping[str, tuple[int, Tensor, Tensor]]) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Write {path: (dim, index, values)} into the weights; what was there, in the same form."""
    found = {}
    for path, (dim, index, own) in values.items():
        weight = _matrix(model, path)
        place = index.to(weight.device)
        found[path] = (dim, index, weight.index_select(dim, place))
        weight.index_copy_(dim, place, own.to(weight))
    return found


@contextmanager
def serving(
    model: nn.Module, adapters: Sequence[Slices], which: Tensor, *, on_other_base: str = "error"
) -> Iterator[None]:
    """Within the block, sample s of a batch is answered with adapter which[s], or with the base where that is -1.

    which: (b,) int64. Inputs of the adapted linears are (b, ..., i). Adapters may differ in modules and numbers of units.
    on_other_base: see `switch`.
    """
    refuse_adapted(model, "serving")
    refuse_switched(model, "serving")
    if not adapters or which.ndim != 1 or not (int(which.min()) >= -1 and int(which.max()) < len(adapters)):
        raise UserError(
            f"serving: which must be (b,) with numbers from -1 to {len(adapters) - 1}, one for each sample."
        )
    for one in adapters:
        _check(model, one)
        _check_base(model, one, on_other_base)
    with ExitStack() as stack:
        for path in dict.fromkeys(path for one in adapters for path in one):
            handle = model.get_submodule(path).register_forward_hook(_adding(model, path, adapters, which))
            stack.callback(handle.remove)
        yield


def _adding(model: nn.Module, path: str, adapters: Sequence[Slices], which: Tensor) -> Callable:
    """A hook that adds to the output of a linear what each sample's adapter adds."""
    weight = _matrix(model, path)
    own = [one.get(path) for one in adapters]
    dim = next(one.dim for one in own if one is not None)
    most = max(len(one.index) for one in own if one is not None)
    index = torch.zeros(len(own) + 1, most, dtype=torch.int64)  # the last adapter is the base: zeros
    delta = torch.zeros(len(own) + 1, most, weight.shape[1 - dim])
    for number, one in enumerate(own):
        if one is not None:
            index[number, : len(one.index)] = one.index
            delta[number, : len(one.index)] = one.delta if dim == 0 else one.delta.t()
    index, delta = index.to(weight.device)[which], delta.to(weight)[which]  # (b, k), (b, k, i or o)

    def add(_module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        x = inputs[0]
        if len(x) != len(which):
            raise UserError(f"serving: a batch of {len(x)} samples, which names adapters for {len(which)}.")
        flat, place = x.reshape(len(x), -1, x.shape[-1]), index[:, None]  # (b, n, i), (b, 1, k)
        result, factors = out.reshape(len(x), -1, out.shape[-1]), delta.to(out.dtype)
        place = place.expand(-1, flat.shape[1], -1)
        if dim == 1:
            result = torch.baddbmm(result, flat.gather(2, place).to(out.dtype), factors)
        else:
            result = result.scatter_add(2, place, flat.to(out.dtype) @ factors.mT)
        return result.view(out.shape)

    return add


def _matrix(model: nn.Module, path: str) -> Tensor:
    """The weight as (o, i), a view."""
    module = model.get_submodule(path)
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def _check(model: nn.Module, slices: Slices) -> None:
    modules = dict(model.named_modules())
    for path, one in slices.items():
        if kind_of(modules.get(path)) not in ("linear", "conv1d"):
            raise UserError(f"slices: {type(model).__name__} has no linear '{path}' to change.")
        shape = matrix_shape(modules[path])
        if one.delta.shape[1 - one.dim] != shape[1 - one.dim] or int(one.index.max()) >= shape[one.dim]:
            raise UserError(
                f"slices: '{path}': the change is {tuple(one.delta.shape)}, the weight {shape}: another model."
            )


def _check_base(model: nn.Module, slices: Slices, on_other_base: str) -> None:
    """The weights, which hold no other change now, are those that the slices were made for."""
    saved = {path: list(one.base) for path, one in slices.items() if one.base}
    own = base_samples(model, saved)
    different = [path for path in saved if not same_base({path: own[path]}, saved)]
    if different:
        told = f"slices: made for other weights than those of this {type(model).__name__} ('{different[0]}')"
        other_base(told, on_other_base)
