"""Gradients of single tasks on the balanced parameters, their Gram matrix, and the scalar with the balanced gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vismt.multitask.balancing import Balancer, TaskLosses, check_choice, check_range, processes, weighted_sum

HEAD_GRADIENTS = ("plain", "weighted")
COLUMNS = 1 << 22  # columns of the gradient matrix that are converted to float64 at a time


class GradientBalancer(Balancer, ABC):
    """Base class of the methods that use gradients: `solve` computes alpha from a Gram matrix.

    A task with a gradient of exactly 0 is treated like an absent one, but its head is trained. With a gradient that is not
    finite the result is the sum of the losses, so that the caller detects the bad step.

    Args:
        tasks: names of the tasks.
        heads: gradient of parameters outside the given ones: "plain", that of sum_t L_t, or "weighted", that of
            sum_t alpha_t L_t, where alpha_t = 0 stops and alpha_t < 0 reverses the training of a head; None for the choice of
            the method's authors.
        loss_scale: factor of the losses in the backward passes for the Gram matrix, divided out afterwards (float16 loses
            gradients below 6e-8: use 1024, for example).
        common: options of `Balancer`.
    """

    default_heads = "plain"

    def __init__(
        self, tasks: Sequence[str], *, heads: str | None = None, loss_scale: float = 1.0, **common: Any
    ) -> None:
        super().__init__(tasks, **common)
        self.heads, self.loss_scale = self.default_heads if heads is None else heads, loss_scale
        check_choice("heads", self.heads, HEAD_GRADIENTS)
        check_range("loss_scale", loss_scale, 0 < loss_scale < math.inf, "positive")

    @abstractmethod
    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        """Return alpha (t,) of the t tasks with a gradient.

        gram: (t, t), losses: (t,), float64 on the CPU; tasks: (t,) task numbers.
        """

    def prepared(self, batch: TaskLosses) -> TaskLosses:
        """Return the batch with the losses whose gradients are balanced; in this class as it is."""
        return batch

    def smoothed(self, gradients: Tensor, present: Tensor) -> Tensor:
        """Return the vectors (T, P) that are balanced; in this class the gradients (T, P), all finite.

        present: (T,) bool on the CPU.
        """
        return gradients

    def surrogate(self, batch: TaskLosses, parameters: Sequence[Tensor]) -> Tensor:
        batch = self.prepared(batch)
        gradients = self._gradients(batch.losses, parameters)
        vectors, alpha = gradients, batch.present.double()
        finite = bool(gradients.isfinite().all())
        if finite:
            vectors = self.smoothed(gradients, batch.present)
            gram = gram_matrix(vectors)
            tasks = (batch.present & (gram.diagonal() > 0)).nonzero().flatten()
            if len(tasks):
                alpha[tasks] = self.solve(gram[tasks][:, tasks], tasks, batch.host()[tasks])
        self.alpha.copy_(alpha)
        factors = alpha if self.heads == "weighted" else batch.present.double()
        total = weighted_sum(batch, factors)
        if not finite or (self.heads == "weighted" and vectors is gradients):
            return total
        # The losses give sum_t factor_t g_t; a term that is linear in the parameters and has value 0 adds the rest of d.
        rest = (alpha - factors).to(gradients) @ gradients
        if vectors is not gradients:
            rest = rest + alpha.to(gradients) @ (vectors - gradients)
        parts = rest.split([p.numel() for p in parameters])
        linear = sum((p * part.view_as(p)).sum() for p, part in zip(parameters, parts))
        return total + (linear - linear.detach())

    def _gradients(self, losses: dict[int, Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Return g_t (T, P), averaged over the processes, in at least float32; zeros for absent tasks."""
        dtype = gradient_dtype(parameters)
        size = sum(p.numel() for p in parameters)
        rows = torch.zeros(len(self.tasks), size, dtype=dtype, device=parameters[0].device)
        for number, loss in losses.items():
            scaled = loss * self.loss_scale
            gradients = torch.autograd.grad(
                scaled, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows[number] = torch.cat([gradient.flatten().to(dtype) for gradient in gradients])
        if processes() > 1:
            dist.all_reduce(rows)
        return rows.div_(processes() * self.loss_scale)


def gradient_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which gradients of parameters are kept, at least float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


@torch.no_grad()
def gram_matrix(gradients: Tensor) -> Tensor:
    """Return <g_s, g_t> (T, T) in float64 on the CPU, from gradients (T, P)."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(COLUMNS, dim=1):
        wide = part.cpu().double() if part.device.type == "mps" else part.double()  # MPS has no float64
        gram += (wide @ wide.T).cpu()
    return gram
