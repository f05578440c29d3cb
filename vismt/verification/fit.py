"""Compare one module of a merged checkpoint M with its base W and the update D of an adapter: which k gives M = round(W + k D)?

    E = M - W,   c = <E, D> / <D, D>,   P_k = round_t(W + k D),   c_P = <P_1 - W, D> / <D, D>,   t the dtype of M

The minimum over s of |M - W - s D| is at s = c. If W already lies on the grid of t, rounding is not independent of D. A right
merge in bf16 with |D| / |W| = 1e-3 has c = 0.5, because every element that moves by less than half a spacing stays. Therefore c
is compared with c_P and not with 1, and k is named by the distance of M to P_k. The standard error of c from independent
rounding is eps_t |M| / (|D| sqrt(N)). eps_t = 0.425 / 2^p is the RMS relative error of a number with p significant bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vismt.lowrank.update import Update

_CHUNK = 2**18  # elements at a time, so that copies in other dtypes stay small
SAMPLE = 2**20  # elements that distinguish one factor from another
FEWEST = 32  # elements that an update has to move for a merge to hold it
BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
FitKind = Literal["right", "factor", "other", "unresolved", "none"]


@dataclass(frozen=True)
class Merge:
    """A merge: W + factor s B A, `times` times. For DoRA and in bits, (times 2, factor 1) and (times 1, factor 2) differ."""

    factor: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Fit:
    """The relation of M to W and D.

    Args:
        kind: right, factor (M = round(W + factor D)), other (M - W is not a multiple of D), unresolved (rounding leaves fewer
            than FEWEST elements that D moves), or none (D is zero).
        factor: Factor k of the update.
        rule: Mistake that gives this factor.
        scale: c.
        expected: c_P.
        resolution: Relative error of the factor, 6 standard errors.
        residual: |E - c D| / |M|.
        cosine: Cosine of E and D.
        norm: |D|.
        lost: |P_1 - (W + D)|.
    """

    kind: FitKind
    factor: float | None = None
    rule: str = ""
    scale: float = 0.0
    expected: float = 1.0
    resolution: float = 0.0
    residual: float = 0.0
    cosine: float = 0.0
    norm: float = 0.0
    lost: float = 0.0


Rounded = Callable[[Tensor, Tensor, torch.dtype], Tensor]
# Ways to merge: add and round once, round D first, round W first. DoRA also has `_merge_in_half`.
ROUNDED: tuple[Rounded, ...] = (
    lambda W, D, t: (W + D).to(t),
    lambda W, D, t: (W + D.to(t).to(W.dtype)).to(t),
    lambda W, D, t: (W.to(t).to(W.dtype) + D).to(t),
)


@dataclass
class _Sums:
    """Sums in fp64 over elements, of products of E, D, M and P - W for each way to round."""

    n: int = 0
    ed: float = 0.0
    dd: float = 0.0
    ee: float = 0.0
    mm: float = 0.0
    moved: int = 0

    lost: list[float] = field(default_factory=list)
    pd: list[float] = field(default_factory=list)
    pp: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)


def fit_merge(W: Tensor, M: Tensor, update: Update, rank: int, rslora: bool = False) -> Fit:
    """Return the fit of matrices W and M (o, i) to an update. rank, rslora: Settings of the update, to name wrong factors."""
    sums = _sums(W, M, update, Merge(), _chunks(W), 1, wide=False)
    if sums.dd == 0:
        return Fit("none")
    if sums.distance[0]:
        sums = _sums(W, M, update, Merge(), _chunks(W), _ways(M.dtype, update))
    best = min(range(len(sums.distance)), key=lambda way: sums.distance[way])
    scale, expected = sums.ed / sums.dd, sums.pd[best] / sums.dd
    error = 0.425 * 2.0 ** -BITS[M.dtype] * (sums.mm / sums.dd / sums.n) ** 0.5
    residual = max(sums.ee - scale**2 * sums.dd, 0.0) ** 0.5
    noise = max(sums.pp[best] - expected**2 * sums.dd, 0.0) ** 0.5
    cosine = sums.ed / (sums.ee * sums.dd) ** 0.5 if sums.ee else 0.0
    found = {
        "scale": scale,
        "expected": expected,
        "resolution": 6 * error / max(abs(expected), 1e-12),
        "residual": residual / max(sums.mm, 1e-300) ** 0.5,
        "cosine": cosine,
        "norm": sums.dd**0.5,
        "lost": sums.lost[best] ** 0.5,
    }
    if sums.moved < FEWEST and sums.distance[best] <= sums.pp[best] + sums.dd:
        return Fit("unresolved", **found)
    if sums.distance[best] == 0:
        return Fit("right", 1.0, **found)
    named = _named(W, M, update, rank, rslora)
    if named is not None:
        return Fit("factor", named[0], named[1], **found)
    alone = residual <= 1.5 * noise + 1e-2 * max(1.0, abs(scale)) * sums.dd**0.5
    if alone and abs(scale - expected) <= 6 * error + 1e-3 * max(1.0, expected):
        return Fit("right", 1.0, **found)
    if alone:
        return Fit("factor", scale / expected, **found)
    return Fit("other", **found)


def _chunks(W: Tensor) -> list[slice]:
    step = max(1, _CHUNK // W.shape[1])
    return [slice(start, start + step) for start in range(0, W.shape[0], step)]


def _sums(
    W: Tensor, M: Tensor, update: Update, merge: Merge, chunks: list[slice], ways: int, wide: bool = True
) -> _Sums:
    """Return the sums over rows for a merge.

    ways: Number of ways to round. wide: Whether to multiply in fp64, which the residual of an fp32 merge needs.
    """
    sums = _Sums()
    sums.pd, sums.pp, sums.distance, sums.lost = ([0.0] * ways for _ in range(4))
    dtype = torch.float64 if torch.float64 in (W.dtype, M.dtype) else torch.float32

    def dot(one: Tensor, two: Tensor) -> float:
        parts = [part.flatten().double() if wide else part.flatten() for part in (one, two)]
        return float(parts[0] @ parts[1])

    for rows in chunks:
        w, m = W[rows].to(dtype), M[rows].to(dtype)
        first = update.step(w, rows, merge.factor)
        E, D = m - w, first
        for _ in range(merge.times - 1):
            D = D + update.step(w + D, rows, merge.factor)
        D = D * bool(merge.times)
        sums.n += D.numel()
        sums.ed += dot(E, D)
        sums.dd += dot(D, D)
        sums.ee += dot(E, E)
        sums.mm += dot(m, m)
        for way in range(ways):
            P = w.to(M.dtype) if not merge.times else w
            for _ in range(merge.times):
                wide_P = P.to(dtype)
                if way < len(ROUNDED):
                    step = update.step(wide_P, rows, merge.factor) if P is not w else first
                    P = ROUNDED[way](wide_P, step, M.dtype)
                else:
                    P = _merge_in_half(update, wide_P, rows, merge.factor, M.dtype)
            step = P.to(dtype) - w
            away, lost = E - step, step - D
            sums.distance[way] += dot(away, away)
            sums.pd[way] += dot(step, D)
            sums.pp[way] += dot(step, step)
            sums.lost[way] += dot(lost, lost)
            if not way:
                sums.moved += int((w.to(M.dtype) != P).sum())
    return sums


def _merge_in_half(update: Update, W: Tensor, rows: slice, factor: float, dtype: torch.dtype) -> Tensor:
    """Return rows of a merge of DoRA in a model of 16 bits, whose magnitudes and lengths are also rounded."""
    assert update.magnitude is not None
    block = update.blocks[0]
    product = block.B[rows].to(dtype).float() @ block.A.to(dtype).float()
    total = W.to(dtype) + (factor * block.scale * product).to(dtype)
    lengths = total.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return (update.magnitude[rows, None].to(dtype) / lengths) * total


def known_mistakes(update: Update, rank: int, rslora: bool) -> dict[str, Merge]:
    """Map each known mistake of a merge to the merge that it makes."""
    scale, root = update.blocks[0].scale, rank**0.5
    found = {
        "nothing was merged": Merge(0.0, 0),
        "it was merged twice": Merge(1.0, 2),
        "twice the scale": Merge(2.0),
        "half the scale": Merge(0.5),
        "it was subtracted": Merge(-1.0),
        "the scale alpha / r was left out": Merge(1 / scale if scale else 0.0),
        "alpha was not divided by the rank": Merge(root if rslora else float(rank)),
        "alpha was divided by r in place of sqrt(r) (rsLoRA)": Merge(1 / root if rslora else 1.0),
        "alpha was divided by sqrt(r) in place of r (rsLoRA)": Merge(1.0 if rslora else root),
    }
    return {name: merge for name, merge in found.items() if merge.times != 1 or abs(merge.factor - 1) > 1e-3}


def _named(W: Tensor, M: Tensor, update: Update, rank: int, rslora: bool) -> tuple[float, str] | None:
    """Return the factor other than 1 that fits best, with its rules. None if 1 or no factor fits."""
    chunks = _chunks(W)
    chosen = chunks[:: max(1, len(chunks) * _CHUNK // SAMPLE)]

    def at(merge: Merge) -> _Sums:
        return _sums(W, M, update, merge, chosen, _ways(M.dtype, update))

    present = at(Merge())
    trials = {name: (merge, at(merge)) for name, merge in known_mistakes(update, rank, rslora).items()}
    best = min(trials, key=lambda name: min(trials[name][1].distance))
    merge, trial = trials[best]
    distance, k = min(trial.distance), merge.factor * merge.times
    way = trial.distance.index(distance)
    # The noise of rounding, which is larger if M was rounded twice, and 3 % of D, which is more than products in TF32 leave.
    noise = trial.pp[way] - (trial.pd[way] ** 2 / trial.dd if trial.dd else 0.0)
    most = 2.25 * max(noise, 0.0) + 1e-3 * max(k**2, 1.0) * present.dd
    if distance > min(most, 0.25 * min(present.distance)):
        return None
    alike = [name for name, (_, other) in trials.items() if min(other.distance) <= 1.1 * distance + 1e-9 * present.dd]
    return k, " or ".join(alike)


def _ways(dtype: torch.dtype, update: Update) -> int:
    return 1 if dtype.itemsize > 2 else len(ROUNDED) + (update.magnitude is not None)
