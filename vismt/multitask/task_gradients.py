"""Gradients of single tasks on the balanced parameters, their Gram matrix, and the scalar that has the balanced gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vismt.multitask.balancing import Balancer, TaskLosses, in_range, one_of, processes

HEADS = ("plain", "weighted")
COLUMNS = 1 << 22  # of the gradient matrix held in float64 at a time


class GradientBalancer(Balancer, ABC):
    """Base of the methods that look at gradients: `solve` makes alpha from a Gram matrix.

    heads: what parameters outside the given ones get: "plain", the gradient of sum_t L_t, or "weighted", that of
    sum_t alpha_t L_t, where alpha_t = 0 or < 0 stops or reverses a head; by default as the method's authors have it. loss_scale:
    factor of the losses while the Gram matrix is made, which it leaves unchanged (float16: 1024, say, as gradients below
    6e-8 are lost). A task whose gradient is exactly 0 is passed over as an absent one, its head is trained. A gradient that
    is not finite gives the sum of the losses, so that the step is seen to be bad.
    """

    default_heads = "plain"

    def __init__(
        self, tasks: Sequence[str], *, heads: str | None = None, loss_scale: float = 1.0, **common: Any
    ) -> None:
        super().__init__(tasks, **common)
        self.heads, self.loss_scale = self.default_heads if heads is None else heads, loss_scale
        one_of("heads", self.heads, HEADS)
        in_range("loss_scale", loss_scale, 0 < loss_scale < math.inf, "positive")

    @abstractmethod
    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        """Alpha (t,) of the t tasks that have a gradient. gram (t, t), losses (t,): float64 on the CPU; tasks (t,): numbers."""

    def surrogate(self, batch: TaskLosses, parameters: Sequence[Tensor]) -> Tensor:
        gradients = self._gradients(batch.losses, parameters)
        gram, alpha = gram_matrix(gradients), batch.present.double()
        tasks = (gram.diagonal() > 0).nonzero().flatten()
        finite = bool(gram.isfinite().all())
        if finite and len(tasks):
            alpha[tasks] = self.solve(gram[tasks][:, tasks], tasks, batch.host()[tasks])
        self.alpha.copy_(alpha)
        if self.heads == "weighted":
            return sum(
                (alpha[number].item() * loss for number, loss in batch.losses.items()), batch.means.new_zeros(())
            )
        total = sum(batch.losses.values(), batch.means.new_zeros(()))
        if not finite:
            return total
        # The losses alone give sum_t g_t; the rest of d comes by a term linear in the parameters, of value 0.
        rest = ((alpha - 1).to(gradients) @ gradients).split([p.numel() for p in parameters])
        linear = sum((p * change.view_as(p)).sum() for p, change in zip(parameters, rest))
        return total + (linear - linear.detach())

    def _gradients(self, losses: dict[int, Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """g_t (T, P) over the processes, in float32 at least; zeros for absent tasks."""
        kind = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        size = sum(p.numel() for p in parameters)
        rows = torch.zeros(len(self.tasks), size, dtype=kind, device=parameters[0].device)
        for number, loss in losses.items():
            scaled = loss * self.loss_scale
            found = torch.autograd.grad(
                scaled, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows[number] = torch.cat([gradient.flatten().to(kind) for gradient in found])
        if processes() > 1:
            dist.all_reduce(rows)
        return rows.div_(processes() * self.loss_scale)


@torch.no_grad()
def gram_matrix(gradients: Tensor) -> Tensor:
    """<g_s, g_t> (T, T) in float64 on the CPU, of gradients (T, P)."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(COLUMNS, dim=1):
        wide = part.cpu().double() if part.device.type == "mps" else part.double()  # which has no float64
        gram += (wide @ wide.T).cpu()
    return gram
