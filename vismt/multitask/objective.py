"""Base class of multi-task objectives: balancing, quality retaining, and their state over the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vismt.multitask.balancing.base import Balancer
from vismt.multitask.balancing.gradients import GradientBalancer
from vismt.multitask.emtal.retain import QualityRetaining


class TaskObjective(nn.Module, ABC):
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
        self._last: Any = None  # the latest batch, where the balancer compares its losses before and after the step
        self._precision: AbstractContextManager = nullcontext()

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses by task that the balancer weighs."""

    @property
    def clipped(self) -> Sequence[Tensor] | None:
        """Parameters whose gradient alone is clipped, None for all.

        A balancer of gradients scales those of the heads and of the balanced parameters by different factors (Nash-MTL those of
        heads by thousands), and one norm over both would stop the balanced parameters.
        """
        return self._balanced if isinstance(self.balancer, GradientBalancer) else None

    def balance(self, losses: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return one scalar from the losses by task of a batch; needs a balancer."""
        if type(self.balancer).update is not Balancer.update:
            kind = self.balancer.balanced(self._balanced)[0].device.type
            enabled = torch.is_autocast_enabled(kind)
            self._last = batch
            self._precision = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled)
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
        """Update retaining with the logits of all batches of an optimiser step, and FAMO; call it after the step."""
        if self._batches:
            logits, labels = (torch.cat(parts) for parts in zip(*self._batches))
            self.retain.update(logits, labels)
            self._batches.clear()
        if self._last is not None:
            with torch.no_grad(), self._precision:
                self.balancer.update(self.losses(self._last))
            self._last = None
