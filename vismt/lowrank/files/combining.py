"""Merge several adapters into one, for one weight or for all weights of a model: by a weighted sum or by a merging rule.

The sum, `sum_j weights[j] * delta_j`, is exact for any ranks, cores and scales, because the scale of each adapter goes into the
factors before they are added. `cat` stacks the factors, so that the rank is the sum of the ranks. `svd` writes the same sum in
its smallest form, and may truncate it to the best approximation of a given rank. The merging rules work in the joint bases of
the adapters (vismt/lowrank/cores.py). If one of several adapters has no update of a weight, its update of that weight is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.seeds import mix_seed
from vismt.lowrank.cores import CORE_RULES, Interference, RuleSettings, interference_of, joint_cores
from vismt.lowrank.factors import LowRank, times_core
from vismt.lowrank.files.save_load import same_base
from vismt.lowrank.files.updates import Updates, read_updates
from vismt.lowrank.tensors import fits

SUMS = ("cat", "svd")
COMBINATIONS = (*SUMS, *CORE_RULES)
Adapter = Updates | nn.Module | str | Path


@overload
def combine(
    adapters: Sequence[LowRank],
    weights: Sequence[float] | None = ...,
    method: str = ...,
    rank: int | None = ...,
    *,
    covariances: Sequence[Tensor] | None = ...,
    keep: float = ...,
    drop: float = ...,
    seed: int = ...,
) -> LowRank: ...


@overload
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = ...,
    method: str = ...,
    rank: int | None = ...,
    *,
    covariances: Sequence[Mapping[str, Tensor]] | None = ...,
    keep: float = ...,
    drop: float = ...,
    seed: int = ...,
) -> Updates: ...


def combine(
    adapters: Sequence[LowRank | Adapter],
    weights: Sequence[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
    *,
    covariances: Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
    keep: float = 0.2,
    drop: float = 0.2,
    seed: int = 0,
) -> LowRank | Updates:
    """Merge adapters into one.

    Args:
        adapters: Updates of one weight (`LowRank`), all of the same shape (o, i), or adapters of one base: folders that
            save_adapter, export_peft or peft wrote, adapted models, or results of this function.
        weights: Finite numbers, one for each adapter. Each update is multiplied by its weight before the merge. Weights may be
            negative and need not sum to one. None stands for 1 / T each (the mean) if updates are summed (`cat`, `svd`,
            `core_dare`), and for 1 each with another method. Equal weights other than 1 / T are task arithmetic.
        method: Name of the method. `cat` concatenates the factors (the rank is the sum of all ranks) and rounds once to the
            factors' dtype. `svd` decomposes the sum by QR and a small SVD, and keeps only the rank that the sum has.
            vismt/lowrank/cores.py describes `core_ties`, `knots_ties`, `core_dare`, `tsv` and `regmean`.
        rank: Largest number of singular values of each weight that are kept (Eckart-Young). It must be None with `cat`.
        covariances: Covariances (i, i) of the inputs of each adapter's task, for `regmean`. For adapters of models they are
            given by module path, as `vismt.llm.collect_covariance` returns them.
        keep: Share of the entries of each update that `core_ties` and `knots_ties` keep, in (0, 1].
        drop: Probability with which `core_dare` drops an entry, in [0, 1).
        seed: Seed of the draws of `core_dare`.

    Returns:
        A `LowRank` with scale 1, or `Updates` for adapters, whose `put_on(model)` adapts a stock model. `cat`, and `svd`
        without `rank`, return a single adapter with weight 1.0 unchanged, bit for bit. Parameters that were trained whole (a
        head) are not merged. They are kept if all adapters hold the same bits.

    Raises:
        UserError: If adapters have different shapes or bases, an update is not of low rank (see updates.py), heads differ, the
            number of weights is wrong, a weight is not finite, the method is unknown, a rank or an option is out of range, or
            covariances are missing or do not fit.
    """
    _check_call(adapters, weights, method, rank)
    _check_settings(len(adapters), method, keep, drop, covariances)
    if weights is None:
        weights = [1 / len(adapters) if method in (*SUMS, "core_dare") else 1.0] * len(adapters)
    settings = RuleSettings(keep, drop, seed)
    of_models = [adapter for adapter in adapters if not isinstance(adapter, LowRank)]
    given: Any = covariances  # of one weight a tensor for each adapter, else a table for each
    if len(of_models) == len(adapters):
        opened = [read_updates(adapter, what="combine") for adapter in of_models]
        return _of_models(opened, weights, method, rank, settings, given)
    updates: list[LowRank] = []
    for position, adapter in enumerate(adapters):
        if not isinstance(adapter, LowRank):
            raise UserError(f"combine: adapter {position} is a {type(adapter).__name__} among updates of one weight.")
        updates.append(adapter)
    _check_shapes(dict(enumerate(updates)))
    _check_rank(rank, sum(update.rank for update in updates))
    if method in SUMS:
        return _sum(updates, weights, method, rank)
    if covariances is not None:
        _check_covariances(covariances, updates[0].shape[1])
        settings = replace(settings, covariances=given)
    return _by_rule(updates, weights, method, rank, settings)


def interference(
    adapters: Sequence[Adapter], merged: Adapter, covariances: Sequence[Mapping[str, Tensor]] | None = None
) -> dict[str, Interference]:
    """Return by module path how the updates of adapters relate to each other and to their merge.

    Args:
        adapters: Adapters, as for `combine`.
        merged: Result of the merge.
        covariances: Covariances of the inputs of each adapter's task by module path, as for `combine`. None stands for white
            inputs.

    Raises:
        UserError: If `combine` would refuse the adapters, or a path of `adapters` is not in `merged`.
    """
    if covariances is not None and len(covariances) != len(adapters):
        raise UserError(
            f"interference: {len(adapters)} adapters but {len(covariances)} covariances; give one for each adapter."
        )
    opened = [read_updates(adapter, what="interference") for adapter in adapters]
    result = read_updates(merged, what="interference").low_rank
    found = {}
    for path, present in _by_path(opened).items():
        if path not in result:
            raise UserError(f"interference: the merged adapter has no update of '{path}'.")
        _check_shapes({**present, len(opened): result[path]}, f"'{path}': ")
        inputs = None if covariances is None else _covariances_at(path, covariances, result[path].shape[1])
        found[path] = interference_of(_with_zeros(present, len(opened)), result[path], inputs)
    return found


def _sum(
    updates: Sequence[LowRank], weights: Sequence[float], method: str, rank: int | None, *, wide: bool = False
) -> LowRank:
    """Return the weighted sum.

    wide: Whether to sum half-precision factors in fp32, in which layers and files hold factors.
    """
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
    factors = (update.B, update.A) if update.core is None else (update.B, update.A, update.core)
    if not all(fits(factor) for factor in factors):
        raise UserError("combine: the weighted factors are NaN or infinite; give finite adapters and smaller weights.")


def _by_rule(
    updates: Sequence[LowRank], weights: Sequence[float], method: str, rank: int | None, settings: RuleSettings
) -> LowRank:
    """Return updates merged by a rule, on the device of the first update, in fp32 or, for fp64 factors, in fp64."""
    for update in updates:
        _check_factors(update)
    merged = CORE_RULES[method](joint_cores(updates, weights), settings)
    if rank is not None:
        merged = merged.truncate(min(rank, merged.rank))
    dtype = torch.float64 if any(update.B.dtype == torch.float64 for update in updates) else torch.float32
    merged = merged.to(device=updates[0].B.device, dtype=dtype)
    _check_factors(merged)
    return merged


def _by_path(adapters: Sequence[Updates]) -> dict[str, dict[int, LowRank]]:
    """Return the updates of each weight. Each update is listed under the position of its adapter."""
    found: dict[str, dict[int, LowRank]] = {}
    for position, adapter in enumerate(adapters):
        for path, update in adapter.low_rank.items():
            found.setdefault(path, {})[position] = update
    return found


def _with_zeros(present: Mapping[int, LowRank], count: int) -> list[LowRank]:
    """Return the updates of a weight by `count` adapters. Adapters without an update of the weight get 0."""
    first = next(iter(present.values()))
    nothing = LowRank(torch.zeros_like(first.B[:, :1]), torch.zeros_like(first.A[:1]))
    return [present.get(position, nothing) for position in range(count)]


def _of_models(
    adapters: Sequence[Updates],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    settings: RuleSettings,
    covariances: Sequence[Mapping[str, Tensor]] | None,
) -> Updates:
    base: dict[str, list[float]] = {}
    for position, adapter in enumerate(adapters):
        if not same_base(adapter.base, base):
            raise UserError(f"combine: adapter {position} was made for other base weights than those before it.")
        base |= adapter.base
    also_train = _same_parameters(adapters)
    by_path = _by_path(adapters)
    totals = {path: sum(update.rank for update in updates.values()) for path, updates in by_path.items()}
    _check_rank(rank, max(totals.values()))
    merged = {}
    for path, updates in by_path.items():
        _check_shapes(updates, f"'{path}': ")
        largest = None if rank is None else min(rank, totals[path])
        if method in SUMS:
            merged[path] = _sum(list(updates.values()), [weights[j] for j in updates], method, largest, wide=True)
            continue
        every = _with_zeros(updates, len(adapters))
        inputs = None if covariances is None else _covariances_at(path, covariances, every[0].shape[1])
        own = replace(settings, seed=mix_seed(settings.seed, path), covariances=inputs)
        merged[path] = _by_rule(every, weights, method, largest, own)
    peft = tuple(folder for adapter in adapters for folder in adapter.peft)
    return Updates(merged, also_train, base, peft, "combined adapters" if len(adapters) > 1 else adapters[0].name)


def _same_parameters(adapters: Sequence[Updates]) -> dict[str, Tensor]:
    """Return the parameters that were trained whole. Raise UserError unless all adapters hold the same bits."""
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
        core = None if adapter.core is None else adapter.core.to(work)
        lefts.append(times_core(left, core).to(adapter.B.dtype))
    return LowRank(torch.cat(lefts, dim=1), torch.cat([adapter.A for adapter in adapters], dim=0))


def _covariances_at(path: str, covariances: Sequence[Mapping[str, Tensor]], width: int) -> list[Tensor]:
    for position, of_task in enumerate(covariances):
        if not isinstance(of_task, Mapping) or path not in of_task:
            raise UserError(
                f"combine: covariances of adapter {position} lack '{path}'; give one for each adapted weight."
            )
    found = [of_task[path] for of_task in covariances]
    _check_covariances(found, width, f"'{path}': ")
    return found


def _check_covariances(covariances: Sequence[object], width: int, where: str = "") -> None:
    for position, value in enumerate(covariances):
        if not isinstance(value, Tensor) or tuple(value.shape) != (width, width) or not bool(value.isfinite().all()):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"combine: covariances: {where}the covariance of adapter {position} is {shape}; give ({width}, {width}), all "
                "finite."
            )


def _check_settings(count: int, method: str, keep: float, drop: float, covariances: Sized | None) -> None:
    if not 0 < keep <= 1:
        raise UserError(f"combine: keep is {keep}, give a share in (0, 1].")
    if not 0 <= drop < 1:
        raise UserError(f"combine: drop is {drop}, give a probability in [0, 1).")
    if method == "regmean" and covariances is None:
        raise UserError(
            "combine: 'regmean' needs the covariances of the inputs of each adapter's task; give covariances."
        )
    if method != "regmean" and covariances is not None:
        raise UserError(f"combine: covariances belong to method='regmean'; leave them out with '{method}'.")
    if covariances is not None and len(covariances) != count:
        raise UserError(f"combine: {count} adapters but {len(covariances)} covariances; give one for each adapter.")


def _check_call(
    adapters: Sequence[LowRank | Adapter], weights: Sequence[float] | None, method: str, rank: int | None
) -> None:
    require_known("combine: no method", [method], COMBINATIONS)
    for name, value in (("adapters", adapters), ("weights", () if weights is None else weights)):
        array = name == "weights" and getattr(value, "ndim", 0) == 1
        if isinstance(value, str) or not (array or isinstance(value, Sequence)):
            raise UserError(f"combine: {name} is one {type(value).__name__}; give a list.")
    if not adapters:
        raise UserError("combine: no adapter given, need at least one.")
    if weights is not None:
        if len(weights) != len(adapters):
            raise UserError(f"combine: {len(adapters)} adapters but {len(weights)} weights, give one weight each.")
        _check_weights(weights)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral)):
        raise UserError(f"combine: rank is {shown_value(rank)}, give a whole number or None.")
    if rank is not None and method == "cat":
        raise UserError(f"combine: rank={rank} needs method='svd'; 'cat' keeps the sum of all ranks.")


def _check_weights(weights: Sequence[float]) -> None:
    for position, weight in enumerate(weights):
        if not isinstance(weight, Real) or not _finite(weight):
            raise UserError(f"combine: weight {position} is {shown_value(weight)}, give a finite number.")
    if not math.isfinite(sum((float(weight) for weight in weights), 0.0)):
        raise UserError("combine: the sum of the weights is not finite; give smaller weights.")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond fp64
        return False


def _check_shapes(adapters: dict[int, LowRank], where: str = "") -> None:
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
