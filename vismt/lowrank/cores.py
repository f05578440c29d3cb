"""Adapters of one weight in their joint bases, and the rules that merge them there.

    D_t = w_t s_t B_t C_t A_t = Q_B M_t Q_A,    t = 1..T,    Q_B (o, p), M_t (p, q), Q_A (q, i), orthonormal

Q_B holds the left singular vectors of [D_1 ... D_T], and Q_A the right singular vectors of [D_1; ...; D_T]. Both depend on the
D_t alone. How the D_t are factored does not matter. (The core space of Panariello et al., arXiv 2509.17786, takes the singular
vectors of the stacked factors, which depend on the factorisation.) The M_t have the same inner products as the D_t. p and q are
at most the sum of the ranks, and no (o, i) matrix is formed. Only RegMean works with (i, i) matrices, the covariances. Each
rule is a function of the cores and returns an update of rank at most min(p, q), KnOTS and RegMean of rank at most p:

    core_ties   TIES (Yadav et al., arXiv 2306.01708) on M_t: of each task the share `keep` of the largest entries is kept; the
                sign of their sum is elected, and the entries of that sign are averaged
    knots_ties  the same on M_t Q_A (p, i) (KnOTS, Stoica et al., arXiv 2410.19735, with the singular values on V as in its code)
    core_dare   DARE (Yu et al., arXiv 2311.03099): the entries of M_t are dropped with probability `drop`, the others divided
                by 1 - drop, and summed
    tsv         TSV-M (Gargiulo et al., arXiv 2412.00081): M_t = U_t S_t V_t; polar(U) diag(S) polar(V) for U = [U_1 ... U_T],
                S and V likewise, with polar(X) = X (X^T X)^(-1/2) on the range of X
    regmean     RegMean (Jin et al., arXiv 2212.09849): argmin_D sum_t tr((D - D_t) G_t (D - D_t)^T)
                = Q_B (sum_t M_t Q_A G_t) (sum_t G_t)^-1, exact, for covariances G_t (i, i) of the inputs of task t

TIES and DARE of the papers act on the entries of D_t. An entry of a core belongs to a pair of singular directions. That makes
another rule, so the rules have other names. In RegMean each G_t is divided by its trace, so that all tasks have the same weight
whatever their numbers of samples. The off-diagonal elements of G_t are multiplied by OFF_DIAGONAL as in the authors' code, and
a small ridge pulls towards the mean. The authors' TSV-M keeps min(o, i) / T singular values of each task. Some of these are
zero, and their vectors are arbitrary. Here the numerical rank is kept. Singular values below _TOLERANCE of the largest count as
0 everywhere. Everything is computed in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.lowrank.factors import LowRank, times_core
from vismt.lowrank.svd import double

_TOLERANCE = {torch.float64: 1e-10}  # by dtype of the factors, 1e-5 for other dtypes
OFF_DIAGONAL, RIDGE = 0.95, 1e-6


@dataclass(frozen=True, eq=False)
class Cores:
    """Updates of one weight in joint bases: left (o, p), cores (T, p, q) and right (q, i), all in fp64."""

    left: Tensor
    cores: Tensor
    right: Tensor
    tolerance: float

    def update(self, core: Tensor) -> LowRank:
        """Return left @ core @ right for a core (p, q), of rank min(p, q)."""
        if core.shape[0] <= core.shape[1]:
            return LowRank(self.left, core @ self.right)
        return LowRank(self.left @ core, self.right)


def joint_cores(updates: Sequence[LowRank], weights: Sequence[float]) -> Cores:
    """Return updates of one (o, i) weight in their joint bases. Each update is multiplied by its weight."""
    lefts = [
        (weight * update.scale) * times_core(double(update.B), None if update.core is None else double(update.core))
        for update, weight in zip(updates, weights, strict=True)
    ]
    ranks = [update.rank for update in updates]
    left, upper_left = torch.linalg.qr(torch.cat(lefts, 1))
    right, upper_right = torch.linalg.qr(torch.cat([double(update.A) for update in updates]).mT)
    pairs = zip(upper_left.split(ranks, 1), upper_right.split(ranks, 1))
    cores = torch.stack([ours @ others.mT for ours, others in pairs])
    tolerance = max(_TOLERANCE.get(update.B.dtype, 1e-5) for update in updates)
    u, rows, _ = torch.linalg.svd(torch.cat(cores.unbind(), 1), full_matrices=False)
    _, columns, vh = torch.linalg.svd(torch.cat(cores.unbind(), 0), full_matrices=False)
    u, vh = u[:, : _rank(rows, tolerance)], vh[: _rank(columns, tolerance)]
    return Cores(left @ u, u.mT @ cores @ vh.mT, vh @ right.mT, tolerance)


def _rank(values: Tensor, tolerance: float) -> int:
    """Return the number of descending singular values above the tolerance, at least 1."""
    return max(1, int((values > tolerance * values[0]).sum()))


@dataclass(frozen=True)
class RuleSettings:
    """Settings that rules need besides the cores.

    They are `keep` of TIES, `drop` and the seed of DARE, and the covariances (i, i) of RegMean.
    """

    keep: float = 0.2
    drop: float = 0.2
    seed: int = 0
    covariances: Sequence[Tensor] | None = None


def ties(values: Tensor, keep: float) -> Tensor:
    """Return the TIES merge of values (T, ...).

    The largest entries of each task, a share `keep`, are kept. Each entry elects a sign, and the values of that sign are
    averaged. An entry whose kept values sum to 0 is 0 in the merge.
    """
    flat = values.flatten(1)
    places = flat.abs().topk(max(1, round(keep * flat.shape[1])), dim=1).indices
    kept = torch.zeros_like(flat).scatter(1, places, flat.gather(1, places))
    agreeing = kept.sign() == kept.sum(0).sign()
    agreeing &= kept != 0
    return ((kept * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)).view(values.shape[1:])


def _core_dare(joint: Cores, settings: RuleSettings) -> LowRank:
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.rand(joint.cores.shape, generator=generator, dtype=torch.float64).to(joint.cores.device)
    return joint.update((joint.cores * (drawn >= settings.drop)).sum(0) / (1 - settings.drop))


def _tsv(joint: Cores, settings: RuleSettings) -> LowRank:
    u, s, vh = torch.linalg.svd(joint.cores, full_matrices=False)
    kept = s > joint.tolerance * s[:, :1]
    if not bool(kept.any()):
        return joint.update(joint.cores[0])  # zeros, like all other cores
    left = _polar(u.mT[kept].mT, joint.tolerance)
    return joint.update((left * s[kept]) @ _polar(vh[kept], joint.tolerance))


def _polar(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the orthonormal polar factor of a matrix on its range."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > tolerance * values.amax(0)
    return u[:, kept] @ vh[kept]


def _regmean(joint: Cores, settings: RuleSettings) -> LowRank:
    total = numerator = torch.zeros(())  # on any device
    for core, covariance in zip(joint.cores, settings.covariances or (), strict=True):
        given = double(covariance.to(joint.cores.device))
        given = given / given.trace().clamp_min(torch.finfo(given.dtype).tiny)
        shrunk = torch.lerp(given.diag().diag(), given, OFF_DIAGONAL)
        total, numerator = total + shrunk, numerator + core @ (joint.right @ shrunk)
    ridge = RIDGE * len(joint.cores) / len(total)
    total = total + ridge * torch.eye(len(total)).to(total)
    numerator = numerator + ridge * (joint.cores.mean(0) @ joint.right)
    return LowRank(joint.left, torch.linalg.solve(total, numerator, left=False))


# Each rule maps joint cores and settings to the merged update.
CORE_RULES: dict[str, Callable[[Cores, RuleSettings], LowRank]] = {
    "core_ties": lambda joint, settings: joint.update(ties(joint.cores, settings.keep)),
    "knots_ties": lambda joint, settings: LowRank(joint.left, ties(joint.cores @ joint.right, settings.keep)),
    "core_dare": _core_dare,
    "tsv": _tsv,
    "regmean": _regmean,
}


@dataclass(frozen=True, eq=False)
class Interference:
    """How the updates D_t of one weight relate to each other and to a merged update D.

    cosine: Cosines <D_s, D_t> / (|D_s| |D_t|), (T, T). A pair with a zero update has 0. error: Relative errors (T,),

        e_t = sqrt(tr((D - D_t) G_t (D - D_t)^T) / tr(D_t G_t D_t^T)),

    of the layer's update on the inputs of task t, whose covariance is G_t, or on white inputs. 0 means that the merge keeps the
    update of the task, 1 that the update is lost, NaN that the task has no update.
    """

    cosine: Tensor
    error: Tensor


def interference_of(
    updates: Sequence[LowRank], merged: LowRank, covariances: Sequence[Tensor] | None = None
) -> Interference:
    """Return the interference of updates of one weight.

    covariances: Covariance (i, i) of the inputs of each task. None stands for white inputs.
    """
    joint = joint_cores([*updates, merged], [1.0] * (len(updates) + 1))
    cores, result = joint.cores[:-1], joint.cores[-1]
    norms = cores.flatten(1).norm(dim=1)
    products = cores.flatten(1) @ cores.flatten(1).mT
    cosine = products / (norms[:, None] * norms).clamp_min(torch.finfo(norms.dtype).tiny)

    def energy(core: Tensor, task: int) -> Tensor:
        if covariances is None:
            return core.square().sum()
        inputs = joint.right @ double(covariances[task].to(core.device)) @ joint.right.mT
        return ((core @ inputs) * core).sum().clamp_min(0)

    own = torch.stack([energy(core, task) for task, core in enumerate(cores)])
    left_out = torch.stack([energy(result - core, task) for task, core in enumerate(cores)])
    return Interference(cosine, torch.where(own > 0, (left_out / own).sqrt(), torch.nan))
