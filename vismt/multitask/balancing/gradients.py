"""Balancing by the gradients: alpha of d = sum_t alpha_t g_t as a function of the Gram matrix M = <g_s, g_t>.

Each `solve` takes M (t, t) of the t tasks that are present and have a nonzero gradient, in float64 on the CPU. In the formulas
T is the number of these tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import eigh

from vismt.base.errors import UserError
from vismt.multitask.balancing.base import BALANCERS, TaskLosses, check_choice, check_range
from vismt.multitask.balancing.gram_solvers import RIDGE, fair_weights, gram_root, min_norm_weights
from vismt.multitask.balancing.losses import LEAST, ImtlL
from vismt.multitask.balancing.task_gradients import GradientBalancer, gradient_dtype


@BALANCERS.register("pcgrad")
class PcGrad(GradientBalancer):
    """sum_i g_i': from g_i' = g_i, g_i' -= <g_i', g_j> / |g_j|^2 g_j for every j, in random order, with <g_i', g_j> < 0.

    Yu et al., arXiv 2001.06782. The order is a function of (seed, number of the call).
    """

    def __init__(self, tasks: Sequence[str], *, seed: int = 0, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("seed", seed, seed >= 0, "0 or more")
        self.seed = seed

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        inners = gram.numpy()
        mixed = np.eye(len(inners))  # row i: g_i' in terms of the g_j
        for i, j in random_pairs(len(inners), self.seed, int(self.calls)):
            inner = mixed[i] @ inners[:, j]
            if inner < 0:
                mixed[i, j] -= inner / inners[j, j]
        return torch.from_numpy(mixed.sum(0))


@BALANCERS.register("gradvac")
class GradVac(GradientBalancer):
    """Gradient vaccine: sum_i g_i' with cosines raised to their running means. Wang et al., arXiv 2010.05874.

    From g_i' = g_i, for every j in random order with f < F_ij, f = cos(g_i', g_j),

        g_i' += |g_i'| (F sqrt(1 - f^2) - f sqrt(1 - F^2)) / (|g_j| sqrt(1 - F^2)) g_j,    F = F_ij

    and then F_ij = (1 - beta) F_ij + beta f; F starts at 0, with one group for all parameters. The order is a function of
    (seed, number of the call). The F of an absent task does not change.
    """

    goal: Tensor

    def __init__(self, tasks: Sequence[str], *, beta: float = 0.01, seed: int = 0, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("beta", beta, 0 <= beta <= 1, "from 0 to 1")
        check_range("seed", seed, seed >= 0, "0 or more")
        self.beta, self.seed = beta, seed
        self.register_buffer("goal", torch.zeros(len(self.tasks), len(self.tasks)))  # F

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        goals, inners, numbers = self.goal.cpu().double().numpy(), gram.numpy(), tasks.tolist()
        mixed, norms = np.eye(len(inners)), np.sqrt(inners.diagonal())
        for i, j in random_pairs(len(inners), self.seed, int(self.calls)):
            goal = goals[numbers[i], numbers[j]]
            norm = math.sqrt(max(0.0, mixed[i] @ inners @ mixed[i]))
            if norm == 0:
                continue
            cosine = min(1.0, max(-1.0, mixed[i] @ inners[:, j] / (norm * norms[j])))
            if cosine < goal:
                sine, goal_sine = math.sqrt(1 - cosine**2), max(1e-6, math.sqrt(1 - goal**2))
                mixed[i, j] += norm * (goal * sine - cosine * goal_sine) / (norms[j] * goal_sine)
            goals[numbers[i], numbers[j]] = (1 - self.beta) * goal + self.beta * cosine
        self.goal.copy_(torch.from_numpy(goals))
        return torch.from_numpy(mixed.sum(0))


@BALANCERS.register("mgda")
class Mgda(GradientBalancer):
    """alpha of the shortest vector in the convex hull of the gradients: min |sum_t alpha_t g_t|, alpha >= 0, sum 1.

    Sener & Koltun, arXiv 1810.04650. By default heads are weighted with alpha, which may be 0.

    Args:
        tasks: names of the tasks.
        normalise: alpha is that of the vectors g_t / n_t and then weighs g_t: n_t = 1 ("none"), |g_t| ("l2"), L_t ("loss") or
            L_t |g_t| ("loss+").
        common: options of `GradientBalancer`.
    """

    default_heads = "weighted"

    def __init__(self, tasks: Sequence[str], *, normalise: str = "none", **common: Any) -> None:
        super().__init__(tasks, **common)
        check_choice("normalise", normalise, ("none", "l2", "loss", "loss+"))
        self.normalise = normalise

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        size = torch.ones_like(losses)
        if self.normalise in ("l2", "loss+"):
            size = size * gram.diagonal().sqrt()
        if self.normalise in ("loss", "loss+"):
            size = size * losses.abs().clamp_min(1e-8)
        return min_norm_weights(gram / torch.outer(size, size))


@BALANCERS.register("cagrad")
class CaGrad(GradientBalancer):
    """The d that maximises min_t <g_t, d> within |d - g0| <= c |g0|, g0 the mean gradient. Liu et al., arXiv 2110.14048.

    Solved by the dual: w on the simplex minimises <g_w, g0> + k |g_w|, k = c |g0|, g_w = sum_t w_t g_t;
    d = g0 + k g_w / |g_w|.

    Args:
        tasks: names of the tasks.
        c: radius relative to |g0|, >= 0; 0 gives the mean gradient.
        rescale: d is divided by 1 ("none", the paper), 1 + c ("radius") or 1 + c^2 ("square", the default of the released
            code).
        common: options of `GradientBalancer`.
    """

    def __init__(self, tasks: Sequence[str], *, c: float = 0.5, rescale: str = "none", **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("c", c, c >= 0, "0 or more")
        check_choice("rescale", rescale, ("none", "radius", "square"))
        self.c, self.over = c, {"none": 1.0, "radius": 1 + c, "square": 1 + c**2}[rescale]

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        from scipy.optimize import brentq

        count = len(gram)
        with_mean, radius = gram.mean(1), self.c * float(gram.mean().clamp_min(0).sqrt())  # <g_t, g0>, k
        longest = float(gram.diagonal().max().sqrt())
        if radius <= 1e-12 * longest:
            return torch.full_like(losses, 1 / count) / self.over

        # k |g_w| = min_s k / 2 (|g_w|^2 / s + s). For a given s, w gives the shortest vector in the hull of g_t + s / k g0.
        def weights(s: float) -> Tensor:
            shift = s / radius
            return min_norm_weights(gram + shift * (with_mean + with_mean[:, None]) + shift**2 * gram.mean())

        def excess(s: float) -> float:
            w = weights(s)
            return float((w @ gram @ w).clamp_min(0).sqrt()) - s

        # Below `least` the gradients cancel: g_w / s tends to -1 / k times the part of g0 that helps no task.
        least, most = 1e-6 * longest, (1 + 1e-9) * longest
        s = least if excess(least) <= 0 else brentq(excess, least, most, xtol=1e-14 * longest, rtol=1e-14)
        return (1 / count + radius / s * weights(s)) / self.over


@BALANCERS.register("imtl_g")
class ImtlG(GradientBalancer):
    """d with equal projections <d, g_t / |g_t|> on all gradients, alpha summing to 1: alpha ~ M^-1 n, n_t = |g_t|.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021 (not on arXiv). Where the sum of M^-1 n is negative, the
    paper's scaling would increase the loss of every task; here alpha then sums to -1.
    """

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        cosines = gram / torch.outer(norms, norms)
        # Cosines do not depend on the lengths of the gradients, so a short gradient does not count as linearly dependent.
        alpha = torch.linalg.pinv(cosines, hermitian=True, rtol=RIDGE) @ torch.ones_like(norms) / norms
        total = alpha.sum().abs()
        return alpha / total if total > RIDGE * alpha.abs().sum() else torch.zeros_like(alpha)


@BALANCERS.register("imtl")
class Imtl(ImtlL, ImtlG):
    """Both halves of IMTL: "imtl_g" on the gradients of the losses scaled by "imtl_l", exp(s_t) L_t - s_t."""


@BALANCERS.register("fairgrad")
class FairGrad(GradientBalancer):
    """FairGrad: weights with M w = w^(-1/alpha), the alpha-fair share of the common decrease. Ban & Ji, arXiv 2402.15638.

    alpha = 1 is proportional fairness, Nash-MTL; for large alpha the decreases <d, g_t> become equal. Solved by Newton steps
    (`fair_weights`), the released code calls a least-squares solver.

    Args:
        tasks: names of the tasks.
        alpha: from 0.5 to 10, beyond which the weights differ by more than their precision; 2 is the authors' value for QM9.
        common: options of `GradientBalancer`.
    """

    def __init__(self, tasks: Sequence[str], *, alpha: float = 2.0, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("alpha", alpha, 0.5 <= alpha <= 10, "from 0.5 to 10")
        self.fairness = alpha

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        return fair_weights(gram, self.fairness)


@BALANCERS.register("nash")
class NashMtl(GradientBalancer):
    """Nash-MTL: alpha > 0 with M alpha = 1 / alpha, so |d| = sqrt(T) for gradients of any size.

    Navon et al., arXiv 2202.01017. Computed by Newton steps (`fair_weights`); the released code solves up to 20 convex programs
    a step for it, and clips the gradient of the shared parameters at norm 1: set train.clip. By default heads are weighted with
    alpha.
    """

    default_heads = "weighted"

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        return fair_weights(gram, 1.0)


@BALANCERS.register("upgrad")
class UpGrad(GradientBalancer):
    """The mean of the gradients, each projected on the directions that increase no loss. Quinton & Rey, arXiv 2406.16232.

    d = mean_i argmin { |x - g_i| : <x, g_t> >= 0 for all t } = mean_i sum_t w_it g_t,   w_i = argmin { w^T M w : w >= e_i }
    """

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        from scipy.optimize import nnls

        norms = gram.diagonal().sqrt()
        root = gram_root(gram / torch.outer(norms, norms)).numpy()
        # With w_i = |g_i| (e_i + v) / norms, v >= 0 minimises |root (e_i + v)|: a task's length does not change its v.
        rows = [torch.from_numpy(nnls(root, -column, maxiter=100 * len(root))[0]) for column in root.T]
        weights = norms[:, None] * (torch.eye(len(gram), dtype=gram.dtype) + torch.stack(rows))
        return weights.mean(0) / norms


@BALANCERS.register("dbmtl")
class DbMtl(GradientBalancer):
    """DB-MTL: mean gradients of log L_t, all made as long as the longest. Lin et al., arXiv 2308.12029.

        G_t <- g_t + beta_k (G_t - g_t),  g_t = grad log(L_t + 1e-8),  beta_k = beta / k^sigma for call k = 1, 2, ...
        d = sum_t alpha_t G_t,  alpha_t = max_s |G_s| / |G_t|

    Heads follow the gradient of sum_t log(L_t + 1e-8), as in the released code. Several processes: the logarithm is that of the
    mean loss. The G of an absent task does not change. It is state, T x P numbers for P balanced values: `attach` makes room
    before a checkpoint is read.

    Args:
        tasks: names of the tasks.
        beta: in [0, 1), 0 for the gradients of the batch alone.
        sigma: decay of beta, >= 0.
        common: options of `GradientBalancer`.
    """

    average: Tensor  # G, (T, P)

    def __init__(self, tasks: Sequence[str], *, beta: float = 0.9, sigma: float = 0.5, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("beta", beta, 0 <= beta < 1, "from 0 to below 1")
        check_range("sigma", sigma, 0 <= sigma < math.inf, "0 or more")
        self.beta, self.sigma = beta, sigma
        self.register_buffer("average", torch.zeros(len(self.tasks), 0))

    def attach(self, parameters: Sequence[Tensor]) -> None:
        like = self.balanced(parameters)
        size = sum(parameter.numel() for parameter in like)
        self.average = torch.zeros(len(self.tasks), size, dtype=gradient_dtype(like), device=like[0].device)

    def prepared(self, batch: TaskLosses) -> TaskLosses:
        """Return the batch with log(L_t + 1e-8) as losses."""
        scales = batch.means + LEAST
        losses = {number: loss / scales[number] for number, loss in batch.losses.items()}
        logs = {number: loss - loss.detach() + scales[number].log() for number, loss in losses.items()}
        return replace(batch, losses=logs)

    def smoothed(self, gradients: Tensor, present: Tensor) -> Tensor:
        """Return G after a batch with these gradients, and keep it."""
        before = self.average if self.average.numel() else torch.zeros_like(gradients)
        if before.shape != gradients.shape:
            raise UserError(
                f"balancing: 'dbmtl' keeps mean gradients of {before.shape[1]:,} values, now {gradients.shape[1]:,} are trained; "
                "take another method where a schedule freezes parameters."
            )
        decay = self.beta / (int(self.calls) + 1) ** self.sigma
        rows = present.to(gradients.device)[:, None]
        self.average = torch.where(rows, gradients + decay * (before - gradients), before)
        return self.average

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        return norms.max() / norms


@BALANCERS.register("aligned")
class AlignedMtl(GradientBalancer):
    """Aligned-MTL: the sum of the gradients after making them orthogonal and equally long. Senushkin et al., arXiv 2305.19000.

        M = V diag(l) V^T without eigenvalues up to eps T max l;  B = scale^(1/2) V diag(l^(-1/2)) V^T,  alpha = B 1

    alpha_t may be negative.

    Args:
        tasks: names of the tasks.
        scale: the smallest of the kept l ("min", the paper), their "median" (the lower of two) or their mean ("rmse").
        eps: in [0, 1); the default is that of float32, as in the released code, which is the precision of the gradients.
        common: options of `GradientBalancer`.
    """

    def __init__(self, tasks: Sequence[str], *, scale: str = "min", eps: float = 2.0**-23, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_choice("scale", scale, ("min", "median", "rmse"))
        check_range("eps", eps, 0 <= eps < 1, "from 0 to 1")
        self.scale, self.eps = scale, eps

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        values, vectors = eigh(gram)
        kept = values > self.eps * len(gram) * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        scale = {"min": values[0], "median": values.median(), "rmse": values.mean()}[self.scale]
        return vectors @ ((scale / values).sqrt() * vectors.sum(0))


def random_pairs(count: int, seed: int, call: int) -> list[tuple[int, int]]:
    """Return every (i, j), i != j, sorted by i, with the j of each i in a random order."""
    generator = np.random.default_rng([seed, call])
    return [(i, int(j)) for i in range(count) for j in generator.permutation(count) if j != i]
