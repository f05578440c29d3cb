"""Several adapters of one weight made into one: `sum_j weights[j] * delta_j`.

Both ways are exact for any ranks, cores and scales, because the scale of each adapter goes into the factors before they
are added: `cat` stacks the factors (rank = sum of the ranks), `svd` writes the same sum in its smallest form and may
truncate it to the best approximation of a given rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch

from vismt.errors import UserError, near
from vismt.lowrank.factors import LowRank

METHODS = ("cat", "svd")


def combine(
    adapters: Sequence[LowRank], weights: Sequence[float], method: str = "cat", rank: int | None = None
) -> LowRank:
    """The weighted sum of adapters of one weight.

    Args:
        adapters: one or more, all of the same (o, i).
        weights: one finite number for each adapter; they need not be positive nor sum to one.
        method: `cat` concatenates the factors, rank = the sum of all ranks, rounded once to the factors' dtype;
            `svd` decomposes that sum by QR and a small SVD, and keeps only the rank it has.
        rank: with `svd`, keep at most this many singular values (Eckart-Young); must be None with `cat`.

    Returns a `LowRank` with scale 1. A single adapter with weight 1.0 (and no `rank`) comes back as it is, bit for bit.
    Raises UserError for adapters of different shapes, a wrong number of weights, a weight that is not finite, an
    unknown method, or a rank that is out of range.
    """
    _check(adapters, weights, method, rank)
    if len(adapters) == 1 and weights[0] == 1.0 and rank is None:
        return adapters[0]
    stacked = _concatenate(adapters, weights)
    if method == "cat":
        return stacked
    compact = stacked.compact()
    if rank is None:
        return compact
    return compact.truncate(min(rank, compact.rank))


def _concatenate(adapters: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    lefts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        work = torch.promote_types(adapter.L.dtype, torch.float32)
        left = (float(weight) * adapter.scale) * adapter.L.to(work)
        if adapter.core is not None:
            core = adapter.core.to(work)
            left = left * core if core.ndim == 1 else left @ core
        lefts.append(left.to(adapter.L.dtype))
    return LowRank(torch.cat(lefts, dim=1), torch.cat([adapter.R for adapter in adapters], dim=0))


def _check(adapters: Sequence[LowRank], weights: Sequence[float], method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise UserError(f"combine: no method '{method}'.{near(method, METHODS)}")
    if not adapters:
        raise UserError("combine: no adapter given, need at least one.")
    if len(weights) != len(adapters):
        raise UserError(f"combine: {len(adapters)} adapters but {len(weights)} weights, give one weight each.")
    for position, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UserError(f"combine: weight {position} is {weight!r}, give a finite number.")
        if adapter.shape != adapters[0].shape:
            raise UserError(
                f"combine: adapter {position} is for a {adapter.shape} weight, adapter 0 for {adapters[0].shape}: "
                "only adapters of the same weight can be added."
            )
    if rank is None:
        return
    if method == "cat":
        raise UserError(f"combine: rank={rank} needs method='svd'; 'cat' keeps the sum of all ranks.")
    total = sum(adapter.rank for adapter in adapters)
    if not 1 <= rank <= total:
        raise UserError(f"combine: rank {rank} is outside 1..{total}, the sum of the adapters' ranks.")
