"""Balancing by the gradients: alpha of d = sum_t alpha_t g_t as a function of the Gram matrix M = <g_s, g_t>.

One backward pass for each task gives the gradients of all trained parameters. alpha follows from M (T x T) in float64 on the
CPU. The scalar to call backward on has d as its gradient, so that its own backward pass costs nothing, and the net is not run
backward once more for the sum. Each `solve` takes M (t, t) of the t tasks that are present and have a nonzero gradient. In the
formulas T is the number of these tasks.

The methods here do something that the aggregators of torchjd 0.18 (torchjd_methods.py) do not. FairGrad and Nash-MTL are solved
to the last digits for gradients of any lengths. torchjd misses FairGrad's equation if lengths differ by 10^4, and its Nash-MTL
has state that no checkpoint would hold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vismt.base.errors import require_known
from vismt.multitask.balancing.base import BALANCERS, Balancer, TaskLosses, check_range, count_processes, weighted_sum

HEAD_GRADIENTS = ("plain", "weighted")
COLUMNS_AT_ONCE = 1 << 22  # number of columns of the gradient matrix that are converted to float64 at a time
_RIDGE = 1e-12  # added to cosines, keeps weights finite if vectors cancel


class GradientBalancer(Balancer, ABC):
    """Base class of the methods that use gradients: `solve` computes alpha from a Gram matrix.

    A task with a gradient of exactly 0 is treated like an absent task, but its head is trained. If a gradient is not finite,
    the result is the sum of the losses, so that the caller detects the bad step.

    Args:
        tasks: Names of the tasks.
        heads: Gradient of parameters outside the given ones: "plain" for the gradient of sum_t L_t, or "weighted" for the
            gradient of sum_t alpha_t L_t. With "weighted", alpha_t = 0 stops and alpha_t < 0 reverses the training of a head.
            None takes the choice of the method's authors.
        loss_scale: Factor of the losses in the backward passes, divided out afterwards. float16 loses gradients below 6e-8, so
            use 1024, for example. The scaler of train.precision fp16 does not reach these passes.
        common: Options of `Balancer`.
    """

    default_heads = "plain"
    not_sharded = (
        "balancing by the gradients of single tasks needs the whole trained weights; take a method that weighs losses (ew, "
        "uncertainty)"
    )

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        heads: str | None = None,
        loss_scale: float = 1.0,
        **common: Mapping[str, float] | None,
    ) -> None:
        super().__init__(tasks, **common)
        self.heads, self.loss_scale = self.default_heads if heads is None else heads, loss_scale
        require_known("balancing.heads:", [self.heads], HEAD_GRADIENTS)
        check_range("loss_scale", loss_scale, 0 < loss_scale < math.inf, "positive")

    @abstractmethod
    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        """Return alpha (t,) of the t tasks with a gradient.

        gram: Gram matrix (t, t), float64 on the CPU. losses: Losses (t,), float64 on the CPU. tasks: Task numbers (t,).
        """

    def surrogate(self, batch: TaskLosses, parameters: Sequence[Tensor]) -> Tensor:
        balanced = {id(parameter) for parameter in parameters}
        others = [leaf for leaf in trained_leaves(batch.losses.values()) if id(leaf) not in balanced]
        gradients, of_others = self._gradients(batch, parameters, others)
        alpha = batch.present.double()
        factors = alpha.clone()  # factors of the tasks in the gradient of other parameters
        gram = gram_matrix(gradients)
        if bool(gram.isfinite().all()):  # otherwise the sum of the gradients shows what is not finite
            tasks = (batch.present & (gram.diagonal() > 0)).nonzero().flatten()
            if len(tasks):
                alpha[tasks] = self.solve(gram[tasks][:, tasks], tasks, batch.host()[tasks])
            if self.heads == "weighted":
                factors = alpha
        self.alpha.copy_(alpha)
        combined = (alpha.to(gradients) @ gradients).split([p.numel() for p in parameters])
        changes = {p: change.view_as(p) for p, change in zip(parameters, combined)}
        for number, found in of_others.items():
            scale = float(factors[number]) / self.loss_scale
            for p, change in zip(others, found):
                if change is not None:
                    changes[p] = scale * change if p not in changes else changes[p] + scale * change
        return _WithGradients.apply(weighted_sum(batch, factors).detach(), [*changes.values()], *changes)

    def _gradients(
        self, batch: TaskLosses, parameters: Sequence[Tensor], others: Sequence[Tensor]
    ) -> tuple[Tensor, dict[int, Sequence[Tensor | None]]]:
        """Return g_t (T, P), averaged over the processes, in at least float32. Absent tasks have zeros.

        Also return the gradients of `others` by task. They are the gradients of this process times the loss scale, None for an
        unused parameter.
        """
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        size = sum(p.numel() for p in parameters)
        rows = torch.zeros(len(self.tasks), size, dtype=dtype, device=parameters[0].device)
        of_others: dict[int, Sequence[Tensor | None]] = {}
        for number, loss in batch.losses.items():
            retain = batch.retain_graph or number != max(batch.losses)
            scaled = loss * self.loss_scale
            found: list[Tensor | None] = list(
                torch.autograd.grad(scaled, (*parameters, *others), retain_graph=retain, allow_unused=True)
            )
            of_others[number] = found[len(parameters) :]
            for index, place in enumerate(rows[number].split([p.numel() for p in parameters])):
                gradient, found[index] = found[index], None  # freed before the next pass
                if gradient is not None:
                    place.copy_(gradient.flatten())
        if count_processes() > 1:
            dist.all_reduce(rows)
        if count_processes() * self.loss_scale != 1:
            rows /= count_processes() * self.loss_scale
        return rows, of_others


class _WithGradients(torch.autograd.Function):
    """Function (value (), gradients, *parameters) -> the value, whose gradients by the parameters are the given gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(slopes[0] * gradient for gradient in ctx.gradients)


@BALANCERS.register("fairgrad")
class FairGrad(GradientBalancer):
    """FairGrad: weights with M w = w^(-1/alpha), the alpha-fair share of the common decrease. Ban & Ji, arXiv 2402.15638.

    alpha = 1 is proportional fairness, which is Nash-MTL. For large alpha the decreases <d, g_t> become equal. The weights are
    found by Newton steps (`fair_weights`). The released code calls a least-squares solver.

    Args:
        tasks: Names of the tasks.
        alpha: Fairness from 0.5 to 10. Beyond 10 the weights differ by more than their precision. 2 is the authors' value for
            QM9.
        common: Options of `GradientBalancer`.
    """

    def __init__(self, tasks: Sequence[str], *, alpha: float = 2.0, **common: Any) -> None:
        super().__init__(tasks, **common)
        check_range("alpha", alpha, 0.5 <= alpha <= 10, "from 0.5 to 10")
        self.fairness = alpha

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        return fair_weights(gram, self.fairness)


@BALANCERS.register("nash")
class NashMtl(GradientBalancer):
    """Nash-MTL: alpha > 0 with M alpha = 1 / alpha, so |d| = sqrt(T) for gradients of any size. It is FairGrad with alpha = 1.

    Navon et al., arXiv 2202.01017. The weights are found by Newton steps (`fair_weights`). The released code solves up to 20
    convex programs a step for them, and clips the gradient of the shared parameters at norm 1. Set train.clip to do the same.
    By default heads are weighted with alpha.
    """

    default_heads = "weighted"

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        return fair_weights(gram, 1.0)


# ---- weights as minimisers of functions of M
def fair_weights(gram: Tensor, alpha: float) -> Tensor:
    """Return w (t,) > 0 with M w = w^(-1/alpha), for a Gram matrix M (t, t) in float64.

    For the cosines C of M and lengths n, u = n w minimises u^T C u / 2 - sum_t n_t^(1/alpha - 1) p(u_t), where p' =
    u^(-1/alpha). This is convex, so Newton steps that are halved until the function decreases find the minimum.
    """
    norms = gram.diagonal().sqrt()
    # Lengths are relative to their geometric mean m. M = m^2 M' has w = m^(-2 alpha / (1 + alpha)) w'.
    mean = norms.log().mean().exp()
    lengths, power = norms / mean, 1 / alpha
    cosines = gram / torch.outer(norms, norms) + _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    factors = lengths ** (power - 1)

    def value(u: Tensor) -> float:
        gain = u.log() if power == 1 else u ** (1 - power) / (1 - power)
        return float(u @ cosines @ u / 2 - factors @ gain)

    u = factors ** (1 / (1 + power))  # the solution for orthogonal gradients
    for _ in range(200):
        slope = cosines @ u - factors * u**-power
        step = torch.linalg.solve(cosines + torch.diag(power * factors * u ** (-power - 1)), slope)
        change = float((step / u).abs().max())
        if change < 1e-13:
            break
        decrement = float(slope @ step)
        size = min(1.0, 0.9 / change)  # u stays positive
        now = value(u)
        # Near the minimum the function is flat to rounding, and whole steps converge.
        while change > 1e-4 and size > 1e-12 and value(u - size * step) > now - 1e-4 * size * decrement:
            size /= 2
        u = u - size * step
    return u / lengths * mean ** (-2 / (1 + power))


# ---- gradients
def trained_leaves(losses: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors whose gradients the backward passes of losses give, each once."""
    nodes = [loss.grad_fn for loss in losses]
    seen = set()
    leaves = []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


@torch.no_grad()
def gram_matrix(gradients: Tensor) -> Tensor:
    """Return <g_s, g_t> (T, T) in float64 on the CPU, from gradients (T, P)."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(COLUMNS_AT_ONCE, dim=1):
        wide = part.cpu().double() if part.device.type == "mps" else part.double()  # MPS has no float64
        gram += (wide @ wide.T).cpu()
    return gram
