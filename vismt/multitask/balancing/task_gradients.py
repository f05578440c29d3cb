"""Gradients of single tasks on the balanced parameters, their Gram matrix, and the scalar with the balanced gradient.

One backward pass for each task gives the gradients of all trained parameters. The scalar is linear in these parameters, so that
its own backward pass costs nothing: the net is not run backward once more for the sum.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vismt.multitask.balancing.base import Balancer, TaskLosses, check_choice, check_range, processes, weighted_sum

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
        loss_scale: factor of the losses in the backward passes, divided out afterwards (float16 loses gradients below 6e-8:
            use 1024, for example; the scaler of train.precision fp16 does not reach these passes).
        common: options of `Balancer`.
    """

    default_heads = "plain"
    not_sharded = (
        "balancing by the gradients of single tasks needs the whole trained weights; take a method that weighs losses (ew, "
        "uncertainty)"
    )

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
        balanced = {id(parameter) for parameter in parameters}
        others = [leaf for leaf in trained_leaves(batch.losses.values()) if id(leaf) not in balanced]
        gradients, of_others = self._gradients(batch.losses, parameters, others)
        vectors, alpha = gradients, batch.present.double()
        factors = alpha.clone()  # of the tasks in the gradient of other parameters
        finite = bool(gradients.isfinite().all())
        if finite:
            vectors = self.smoothed(gradients, batch.present)
            gram = gram_matrix(vectors)
            tasks = (batch.present & (gram.diagonal() > 0)).nonzero().flatten()
            if len(tasks):
                alpha[tasks] = self.solve(gram[tasks][:, tasks], tasks, batch.host()[tasks])
        self.alpha.copy_(alpha)
        if not finite:
            return weighted_sum(batch, factors)
        if self.heads == "weighted":
            factors = alpha
        combined = (alpha.to(vectors) @ vectors).split([p.numel() for p in parameters])
        linear = sum((p * change.view_as(p)).sum() for p, change in zip(parameters, combined))
        for number, changes in of_others.items():
            scale = float(factors[number]) / self.loss_scale
            linear = linear + sum(
                (p * change).sum() * scale for p, change in zip(others, changes) if change is not None
            )
        return weighted_sum(batch, factors).detach() + (linear - linear.detach())

    def _gradients(
        self, losses: dict[int, Tensor], parameters: Sequence[Tensor], others: Sequence[Tensor]
    ) -> tuple[Tensor, dict[int, Sequence[Tensor | None]]]:
        """Return g_t (T, P), averaged over the processes, in at least float32; zeros for absent tasks.

        Also returns the gradients of `others` by task, those of this process times the loss scale, None for an unused one.
        """
        dtype = gradient_dtype(parameters)
        size = sum(p.numel() for p in parameters)
        rows = torch.zeros(len(self.tasks), size, dtype=dtype, device=parameters[0].device)
        of_others: dict[int, Sequence[Tensor | None]] = {}
        for number, loss in losses.items():
            found = torch.autograd.grad(
                loss * self.loss_scale, (*parameters, *others), retain_graph=True, allow_unused=True
            )
            for place, gradient in zip(rows[number].split([p.numel() for p in parameters]), found):
                if gradient is not None:
                    place.copy_(gradient.flatten())
            of_others[number] = found[len(parameters) :]
        if processes() > 1:
            dist.all_reduce(rows)
        return rows.div_(processes() * self.loss_scale), of_others


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
