"""Balancing by the losses alone: no gradient of a single task is taken, a step costs what it costs without.

Where alpha is made of the losses, their values come to the CPU once a step. Absent tasks: balancing.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.multitask.balancing import Balancer, TaskLosses, in_range, register_balancer

LEAST = 1e-8  # a loss of exactly 0 has no logarithm


@register_balancer("ew")
class EqualWeighting(Balancer):
    """alpha_t = 1: the sum of the losses, with the fixed `weights` linear scalarisation (Xin et al., arXiv 2209.11379)."""


@register_balancer("uncertainty")
class UncertaintyWeighting(Balancer):
    """sum_t exp(-s_t) L_t / 2 + s_t / 2 with s_t = log sigma_t^2 learned. Kendall et al., arXiv 1705.07115.

    The authors' form for classification, exp(-s) L + s / 2, is this one at s + log 2 and needs no switch. init: s at the
    start. s is a parameter: give it no weight decay if the optimiser can. An absent task leaves its s alone.
    """

    def __init__(self, tasks: Sequence[str], *, init: float = 0.0, **common: Any) -> None:
        super().__init__(tasks, **common)
        in_range("init", init, math.isfinite(init), "finite")
        self.init = init
        self.log_variance = nn.Parameter(torch.empty(len(self.tasks)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every s to `init`."""
        nn.init.constant_(self.log_variance, self.init)

    def rescale(self, number: int, loss: Tensor) -> Tensor:
        s = self.log_variance[number]
        return 0.5 * (torch.exp(-s) * loss + s)


@register_balancer("imtl_l")
class ImtlL(Balancer):
    """sum_t exp(s_t) L_t - s_t with s_t learned from 0, at rest where all scaled losses are 1. Liu et al., "Towards Impartial
    Multi-task Learning", ICLR 2021 (not on arXiv). An absent task leaves its s alone; weight decay as in "uncertainty".
    """

    def __init__(self, tasks: Sequence[str], **common: Any) -> None:
        super().__init__(tasks, **common)
        self.log_scale = nn.Parameter(torch.empty(len(self.tasks)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every s to 0."""
        nn.init.zeros_(self.log_scale)

    def rescale(self, number: int, loss: Tensor) -> Tensor:
        s = self.log_scale[number]
        return torch.exp(s) * loss - s


@register_balancer("dwa")
class DynamicWeightAverage(Balancer):
    """alpha_t = T softmax_t(r_t / temperature), r_t = L_t(e - 1) / L_t(e - 2). Liu et al., arXiv 1803.10704.

    L_t(e): mean over the e-th window of `window` calls; the authors' window is an epoch, so give the batches of one. alpha = 1
    in the first two windows. The mean is over the calls that have the task; r_t = 1 for a task that one of the two windows
    lacks. The softmax is over all tasks, present or not.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(self, tasks: Sequence[str], *, temperature: float = 2.0, window: int = 100, **common: Any) -> None:
        super().__init__(tasks, **common)
        in_range("temperature", temperature, temperature > 0, "positive")
        in_range("window", window, window >= 1, "at least 1")
        self.temperature, self.window = temperature, window
        self.register_buffer("sums", torch.zeros(len(self.tasks)))  # of the window under way
        self.register_buffer("counts", torch.zeros(len(self.tasks)))
        self.register_buffer(
            "means", torch.full((2, len(self.tasks)), torch.nan)
        )  # of the window before last, the last

    def weigh(self, batch: TaskLosses) -> Tensor:
        calls = int(self.calls)
        if calls and calls % self.window == 0:
            self.means.copy_(
                torch.stack([self.means[1], self.sums / self.counts])
            )  # 0 / 0: nan, as the task was absent
            self.sums.zero_()
            self.counts.zero_()
        self.sums += batch.means.to(self.sums)
        self.counts += batch.present.to(self.counts)
        before, last = self.means.cpu().double()
        ratio = last / before
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        return len(self.tasks) * torch.softmax(ratio / self.temperature, 0) * batch.present


@register_balancer("rlw")
class RandomLossWeighting(Balancer):
    """alpha = softmax(z), z standard normal and new at every call. Lin et al., arXiv 2111.10603.

    The weights sum to 1, over the present tasks, where those of "ew" sum to T. z: a function of (seed, number of the call).
    """

    def __init__(self, tasks: Sequence[str], *, seed: int = 0, **common: Any) -> None:
        super().__init__(tasks, **common)
        in_range("seed", seed, seed >= 0, "0 or more")
        self.seed = seed

    def weigh(self, batch: TaskLosses) -> Tensor:
        drawn = np.random.default_rng([self.seed, int(self.calls)]).standard_normal(len(self.tasks))
        return torch.from_numpy(drawn).masked_fill(~batch.present, -torch.inf).softmax(0)


@register_balancer("gls")
class GeometricLoss(Balancer):
    """The geometric mean (prod_t L_t)^(1/T), i.e. alpha_t = (prod_s L_s)^(1/T) / (T L_t). Chennupati et al., arXiv 1904.08492.

    T counts the present tasks. A loss of 0 is taken as 1e-8; UserError for a negative one.
    """

    def weigh(self, batch: TaskLosses) -> Tensor:
        logs = _logs(self, batch.host(), batch.present)
        count = batch.present.sum()
        return torch.where(batch.present, torch.exp(logs.sum() / count - logs) / count, 0.0)


@register_balancer("famo")
class Famo(Balancer):
    """FAMO: all losses to fall at the same relative rate. Liu et al., arXiv 2306.03792.

        z = softmax(xi),  D_t = L_t - least_t + 1e-8,  alpha_t = c z_t / D_t,  1 / c = sum_t z_t / D_t
        xi moves by Adam (rate lr, betas 0.9 and 0.999) on (dz/dxi)^T (log D - log D_after) + gamma xi

    D_after: the same batch after the optimiser's step, for which a job calls `update`; if it does not, the next call's
    losses stand in, which adds the difference of two batches to the signal (and is nothing else between the batches of one
    accumulated step). least: losses that a task cannot fall below, by name, 0 where unnamed; UserError for a loss below.
    softmax over the present tasks, in xi's move over those that both sides have; the other xi keep their momentum.
    """

    xi: Tensor
    moments: Tensor
    updates: Tensor
    before: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        lr: float = 0.025,
        gamma: float = 0.01,
        least: Mapping[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(tasks, **common)
        in_range("lr", lr, lr > 0, "positive")
        in_range("gamma", gamma, gamma >= 0, "0 or more")
        for task in least or {}:
            self._number(task, "least")
        self.lr, self.gamma = lr, gamma
        self.least = torch.tensor([(least or {}).get(task, 0.0) for task in self.tasks], dtype=torch.float64)
        self.register_buffer("xi", torch.zeros(len(self.tasks)))
        self.register_buffer("moments", torch.zeros(2, len(self.tasks)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("before", torch.full((len(self.tasks),), torch.nan))  # log D of the last call; nan: none

    def weigh(self, batch: TaskLosses) -> Tensor:
        logs = self._log_distance(batch.host(), batch.present)
        self._move(logs, batch.present)
        self.before.copy_(logs.masked_fill(~batch.present, torch.nan))
        z = self.xi.cpu().double().masked_fill(~batch.present, -torch.inf).softmax(0)
        share = torch.where(batch.present, z * torch.exp(-logs), 0.0)
        return share / share.sum()

    @torch.no_grad()
    def update(self, losses: Mapping[str, Tensor]) -> None:
        """The same batch's losses after the optimiser's step, on every process; moves xi. UserError as in `combine`."""
        found = {number: self.weights[number] * loss for number, loss in self._checked(losses).items()}
        batch = self._gather(found, self.xi)
        self._move(self._log_distance(batch.host(), batch.present), batch.present)
        self.before.fill_(torch.nan)

    def _log_distance(self, losses: Tensor, present: Tensor) -> Tensor:
        distance = torch.where(present, losses - self.least, 1.0)
        return _logs(self, torch.where(distance >= 0, distance + LEAST, distance), present)

    def _move(self, logs: Tensor, present: Tensor) -> None:
        before = self.before.cpu().double()
        both = present & ~before.isnan()
        if not both.any():
            return
        xi, (first, second) = self.xi.cpu().double(), self.moments.cpu().double()
        gain = torch.where(both, before - logs, 0.0)
        z = xi.masked_fill(~both, -torch.inf).softmax(0)
        gradient = z * (gain - (z * gain).sum()) + self.gamma * xi
        self.updates += 1
        step = int(self.updates)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        self.xi.copy_(xi - self.lr * change)
        self.moments.copy_(torch.stack([first, second]))


def _logs(balancer: Balancer, losses: Tensor, present: Tensor) -> Tensor:
    """Log L_t (T,), 0 for absent tasks."""
    for task, loss in zip(balancer.tasks, losses.tolist()):
        if loss < 0:
            raise UserError(f"balancing: '{balancer.name}' takes logarithms of losses, that of '{task}' is {loss:.3g}.")
    return torch.where(present, losses.clamp_min(LEAST).log(), 0.0)
