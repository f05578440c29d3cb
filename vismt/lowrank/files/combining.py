"""Several adapters made into one: `sum_j weights[j] * delta_j`, for one weight or for all of a model's.

Both ways are exact for any ranks, cores and scales, because the scale of each adapter goes into the factors before they
are added: `cat` stacks the factors (rank = sum of the ranks), `svd` writes the same sum in its smallest form and may
truncate it to the best approximation of a given rank. Where one of several adapters has no update, it adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, near
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.save_load import same_base
from vismt.lowrank.files.updates import Updates, read_updates
from vismt.lowrank.tensors import fits

METHODS = ("cat", "svd")
Adapter = Updates | nn.Module | str | Path


@overload
def combine(
    adapters: Sequence[LowRank], weights: Sequence[float], method: str = ..., rank: int | None = ...
) -> LowRank: ...


@overload
def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = ..., rank: int | None = ...
) -> Updates: ...


def combine(
    adapters: Sequence[LowRank | Adapter], weights: Sequence[float], method: str = "cat", rank: int | None = None
) -> LowRank | Updates:
    """Return the weighted sum of adapters.

    Args:
        adapters: one or more updates of one weight (`LowRank`), all of the same (o, i); or adapters of one base: folders
            that save_adapter, export_peft or peft wrote, adapted models, or results of this function.
        weights: one finite number for each adapter; they need not be positive nor sum to one.
        method: `cat` concatenates the factors, rank = the sum of all ranks, rounded once to the factors' dtype;
            `svd` decomposes that sum by QR and a small SVD, and keeps only the rank it has.
        rank: with `svd`, keep at most this many singular values (Eckart-Young) of each weight; must be None with `cat`.

    Returns:
        A `LowRank` with scale 1, or for adapters `Updates`: their `put_on(model)` adapts a stock model. A single adapter
        with weight 1.0 (and no `rank`) is returned unchanged, bit for bit. Parameters that were trained whole (a head) are
        not summed: they are kept where all adapters hold the same bits.

    Raises:
        UserError: for adapters of different shapes or bases, an update that is not of low rank (see updates.py),
            heads that differ, a wrong number of weights, a weight that is not finite, an unknown method, or a rank that is
            out of range.
    """
    _check_call(adapters, weights, method, rank)
    if not any(isinstance(adapter, LowRank) for adapter in adapters):
        return _of_models([read_updates(adapter, what="combine") for adapter in adapters], weights, method, rank)
    updates: list[LowRank] = []
    for position, adapter in enumerate(adapters):
        if not isinstance(adapter, LowRank):
            raise UserError(f"combine: adapter {position} is a {type(adapter).__name__} among updates of one weight.")
        updates.append(adapter)
    _check_shapes(dict(enumerate(updates)))
    _check_rank(rank, sum(update.rank for update in updates))
    return _sum(updates, weights, method, rank)


def _sum(
    updates: Sequence[LowRank], weights: Sequence[float], method: str, rank: int | None, *, wide: bool = False
) -> LowRank:
    """Return the weighted sum. wide: sum half-precision factors in fp32, as layers and files hold them."""
    if len(updates) == 1 and weights[0] == 1.0 and rank is None:
        _check_factors(updates[0])
        return updates[0]
    if wide:
        updates = [update.to(dtype=torch.promote_types(update.B.dtype, torch.float32)) for update in updates]
    stacked = _concatenate(updates, weights)
    _check_factors(stacked)
    if method == "cat":
        return stacked
    compact = stacked.compact()
    if rank is None:
        return compact
    return compact.truncate(min(rank, compact.rank))


def _check_factors(update: LowRank) -> None:
    """Raise UserError for a sum with NaN or infinite factors."""
    factors = (update.B, update.A) if update.core is None else (update.B, update.A, update.core)
    if not all(fits(factor) for factor in factors):
        raise UserError("combine: the weighted factors are NaN or infinite; give finite adapters and smaller weights.")


def _of_models(adapters: Sequence[Updates], weights: Sequence[float], method: str, rank: int | None) -> Updates:
    base: dict[str, list[float]] = {}
    for position, adapter in enumerate(adapters):
        if not same_base(adapter.base, base):
            raise UserError(f"combine: adapter {position} was made for other base weights than those before it.")
        base |= adapter.base
    also_train = _same_parameters(adapters)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.low_rank))
    by_path = {
        path: {j: adapter.low_rank[path] for j, adapter in enumerate(adapters) if path in adapter.low_rank}
        for path in paths
    }
    totals = {path: sum(update.rank for update in updates.values()) for path, updates in by_path.items()}
    _check_rank(rank, max(totals.values()))
    sums = {}
    for path, updates in by_path.items():
        _check_shapes(updates, f"'{path}': ")
        largest = None if rank is None else min(rank, totals[path])
        sums[path] = _sum(list(updates.values()), [weights[j] for j in updates], method, largest, wide=True)
    peft = tuple(folder for adapter in adapters for folder in adapter.peft)
    return Updates(sums, also_train, base, peft, "combined adapters" if len(adapters) > 1 else adapters[0].name)


def _same_parameters(adapters: Sequence[Updates]) -> dict[str, Tensor]:
    """Return the parameters that were trained whole; UserError unless all adapters hold the same bits."""
    first = adapters[0].also_train
    for position, adapter in enumerate(adapters[1:], 1):
        values = adapter.also_train
        for name in sorted(values.keys() | first.keys()):
            if name not in values or name not in first or not torch.equal(values[name], first[name]):
                raise UserError(
                    f"combine: adapters 0 and {position} do not hold the same '{name}', which was trained whole; leave such "
                    "parameters out: vismt.lowrank.read_updates(adapter, also_train=False)."
                )
    return first


def _concatenate(adapters: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    lefts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        work = torch.promote_types(adapter.B.dtype, torch.float32)
        left = (float(weight) * adapter.scale) * adapter.B.to(work)
        if adapter.core is not None:
            core = adapter.core.to(work)
            left = left * core if core.ndim == 1 else left @ core
        lefts.append(left.to(adapter.B.dtype))
    return LowRank(torch.cat(lefts, dim=1), torch.cat([adapter.A for adapter in adapters], dim=0))


def _check_call(adapters: Sequence[LowRank | Adapter], weights: Sequence[float], method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise UserError(f"combine: no method '{method}'.{near(str(method), METHODS)}")
    for name, value in (("adapters", adapters), ("weights", weights)):
        array = name == "weights" and getattr(value, "ndim", 0) == 1
        if isinstance(value, str) or not (array or isinstance(value, Sequence)):
            raise UserError(f"combine: {name} is one {type(value).__name__}; give a list.")
    if not adapters:
        raise UserError("combine: no adapter given, need at least one.")
    if len(weights) != len(adapters):
        raise UserError(f"combine: {len(adapters)} adapters but {len(weights)} weights, give one weight each.")
    _check_weights(weights)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral)):
        raise UserError(f"combine: rank is {rank!r}, give a whole number or None.")
    if rank is not None and method == "cat":
        raise UserError(f"combine: rank={rank} needs method='svd'; 'cat' keeps the sum of all ranks.")


def _check_weights(weights: Sequence[float]) -> None:
    """Raise UserError unless each weight and their sum are finite numbers."""
    for position, weight in enumerate(weights):
        if not isinstance(weight, Real) or not _finite(weight):
            raise UserError(f"combine: weight {position} is {weight!r}, give a finite number.")
    if not math.isfinite(sum((float(weight) for weight in weights), 0.0)):
        raise UserError("combine: the sum of the weights is not finite; give smaller weights.")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond fp64
        return False


def _check_shapes(adapters: dict[int, LowRank], where: str = "") -> None:
    """Raise UserError unless the adapters, by position, have one shape."""
    first, *others = adapters
    for position in others:
        if adapters[position].shape != adapters[first].shape:
            raise UserError(
                f"combine: {where}adapter {position} is for a {adapters[position].shape} weight, adapter {first} for "
                f"{adapters[first].shape}: only adapters of the same weight can be added."
            )


def _check_rank(rank: int | None, total: int) -> None:
    if rank is not None and not 1 <= rank <= total:
        raise UserError(f"combine: rank {rank} is outside 1..{total}, the sum of the adapters' ranks.")
