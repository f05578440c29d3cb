"""Balancing by the losses: no gradient of a single task is computed, so a step costs as much as without balancing.

Methods that compute alpha from the losses copy their values to the CPU once a step. base.py says how absent tasks are treated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.multitask.balancing.base import BALANCERS, Balancer, TaskLosses, check_range

_LEAST = 1e-8  # a loss of 0 has no logarithm


@BALANCERS.register("ew")
class EqualWeighting(Balancer):
    """alpha_t = 1, the sum of the losses. With fixed `weights` this is linear scalarisation (Xin et al., arXiv 2209.11379)."""


@BALANCERS.register("uncertainty")
class UncertaintyWeighting(Balancer):
    """sum_t exp(-s_t) L_t / 2 + s_t / 2 with s_t = log sigma_t^2 learned. Kendall et al., arXiv 1705.07115.

    The authors' form for classification, exp(-s) L + s / 2, is this form at s + log 2, and needs no option. s is a parameter.
    Exclude it from weight decay if the optimiser allows. The s of an absent task does not change.

    Args:
        tasks: Names of the tasks.
        init: Start value of s.
        common: Options of `Balancer`.
    """

    def __init__(self, tasks: Sequence[str], *, init: float = 0.0, **common: Mapping[str, float] | None) -> None:
        super().__init__(tasks, **common)
        check_range("init", init, math.isfinite(init), "finite")
        self.init = init
        self.log_variance = nn.Parameter(torch.empty(len(self.tasks)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every s to `init`."""
        nn.init.constant_(self.log_variance, self.init)

    def rescale(self, number: int, loss: Tensor) -> Tensor:
        s = self.log_variance[number]
        return 0.5 * (torch.exp(-s) * loss + s)


@BALANCERS.register("dwa")
class DynamicWeightAverage(Balancer):
    """alpha_t = T softmax_t(r_t / temperature), r_t = L_t(e - 1) / L_t(e - 2). Liu et al., arXiv 1803.10704.

    L_t(e) is the mean over the e-th window of `window` calls. Only calls that have the task count. alpha = 1 in the first two
    windows. r_t = 1 for a task that one of the two windows lacks. The softmax is over all tasks, present or not.

    Args:
        tasks: Names of the tasks.
        temperature: Temperature of the softmax, > 0.
        window: Number of calls in a window. The authors' window is an epoch, so pass the number of batches of an epoch.
        common: Options of `Balancer`.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(
        self, tasks: Sequence[str], *, temperature: float = 2.0, window: int = 100, **common: Mapping[str, float] | None
    ) -> None:
        super().__init__(tasks, **common)
        check_range("temperature", temperature, temperature > 0, "positive")
        check_range("window", window, window >= 1, "at least 1")
        self.temperature, self.window = temperature, window
        self.register_buffer("sums", torch.zeros(len(self.tasks)))  # sums over the current window
        self.register_buffer("counts", torch.zeros(len(self.tasks)))
        # Means of the window before last and of the last window.
        self.register_buffer("means", torch.full((2, len(self.tasks)), torch.nan))

    def weigh(self, batch: TaskLosses) -> Tensor:
        calls = int(self.calls)
        if calls and calls % self.window == 0:
            # 0 / 0 gives NaN for a task that was absent from the window.
            self.means.copy_(torch.stack([self.means[1], self.sums / self.counts]))
            self.sums.zero_()
            self.counts.zero_()
        self.sums += batch.means.to(self.sums)
        self.counts += batch.present.to(self.counts)
        before, last = self.means.cpu().double()
        ratio = last / before
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        return len(self.tasks) * torch.softmax(ratio / self.temperature, 0) * batch.present


@BALANCERS.register("famo")
class Famo(Balancer):
    """FAMO: weights with which all losses decrease at the same relative rate. Liu et al., arXiv 2306.03792.

        z = softmax(xi),  D_t = L_t - least_t + 1e-8,  alpha_t = c z_t / D_t,  1 / c = sum_t z_t / D_t
        Adam (rate lr, betas 0.9 and 0.999) updates xi with the gradient (dz/dxi)^T (log D - log D_after) + gamma xi

    D_after is computed on the same batch after the optimiser's step. Objectives pass it to `update` (MultitaskObjective.step), at
    the price of another forward pass. Without a call of `update`, the losses of the next call of `combine` are used, which adds
    the difference of two batches to the signal. Between the batches of one accumulated step, the signal is that difference
    alone. The softmax runs over the present tasks, and in the update of xi over the tasks that are present both before and
    after. The other xi keep their momentum.

    Args:
        tasks: Names of the tasks.
        lr: Rate of Adam, > 0.
        gamma: Decay of xi, >= 0.
        least: Lower bounds of the losses by task, 0 for tasks without an entry. A loss below its bound raises UserError.
        common: Options of `Balancer`.
    """

    not_sharded = "'famo' computes losses again after the step, outside of the sharded net; take 'uncertainty'"
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
        **common: Mapping[str, float] | None,
    ) -> None:
        super().__init__(tasks, **common)
        check_range("lr", lr, lr > 0, "positive")
        check_range("gamma", gamma, gamma >= 0, "0 or more")
        for task in least or {}:
            self._number(task, "least")
        self.lr, self.gamma = lr, gamma
        self.least = torch.tensor([(least or {}).get(task, 0.0) for task in self.tasks], dtype=torch.float64)
        self.register_buffer("xi", torch.zeros(len(self.tasks)))
        self.register_buffer("moments", torch.zeros(2, len(self.tasks)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # log D of the last call, NaN for no value.
        self.register_buffer("before", torch.full((len(self.tasks),), torch.nan))

    def weigh(self, batch: TaskLosses) -> Tensor:
        logs = self._log_distance(batch.host(), batch.present)
        self._move(logs, batch.present)
        self.before.copy_(logs.masked_fill(~batch.present, torch.nan))
        z = self.xi.cpu().double().masked_fill(~batch.present, -torch.inf).softmax(0)
        share = torch.where(batch.present, z * torch.exp(-logs), 0.0)
        return share / share.sum()

    @torch.no_grad()
    def update(self, losses: Mapping[str, Tensor]) -> None:
        weighted = {number: self.weights[number] * loss for number, loss in self._checked(losses).items()}
        batch = self._gather(weighted, self.xi)
        self._move(self._log_distance(batch.host(), batch.present), batch.present)
        self.before.fill_(torch.nan)

    def _log_distance(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return log D (T,). Absent tasks have 0."""
        distance = torch.where(present, losses - self.least, 1.0)
        for task, value in zip(self.tasks, distance.tolist()):
            if value < 0:
                raise UserError(
                    f"balancing: 'famo' takes logarithms of losses, and the loss of '{task}' is {value:.3g}."
                )
        return torch.where(present, (distance + _LEAST).log(), 0.0)

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
