"""Base class of multi-task objectives: balancing, quality retaining, and their state over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismt.multitask.balancing import Balancer
from vismt.multitask.retain import QualityRetaining


class TaskObjective(nn.Module):
    """Base class of objectives; call `step()` after each optimiser step.

    net, balancer and retain are submodules, so that their state is saved with the training.

    Args:
        net: the trained net.
        balancer: weighs the losses of the tasks.
        balanced: parameters whose gradients the balancer uses.
        retain: quality retaining.
    """

    def __init__(
        self,
        net: nn.Module,
        balancer: Balancer | None,
        balanced: Sequence[Tensor],
        retain: QualityRetaining | None,
    ) -> None:
        super().__init__()
        self.net, self.balancer, self.retain = net, balancer, retain
        self._balanced = tuple(balanced)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def balance(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return one scalar from the losses by task; needs a balancer."""
        return self.balancer.combine(losses, self._balanced)

    def remember(self, logits: Tensor, labels: Tensor) -> None:
        """Store a batch, which the next `step` adds to the bank of `retain`."""
        self._batches.append((logits.detach(), labels))

    def logged(self) -> dict[str, Tensor]:
        """Return "weight/<task>", alpha of the balancer for the last batch."""
        if self.balancer is None:
            return {}
        return {f"weight/{name}": value for name, value in self.balancer.last_alpha().items()}

    def step(self) -> None:
        """Add the logits of all batches of an optimiser step to the bank; call it after the step."""
        if self._batches:
            logits, labels = (torch.cat(parts) for parts in zip(*self._batches))
            self.retain.update(logits, labels)
            self._batches.clear()
