"""What the objectives of several tasks share: balancing, quality retaining and router fading, and their state over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismt.multitask.balancing import Balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.retain import QualityRetaining


class TaskObjective(nn.Module):
    """Base of objectives: `step()` follows each optimiser step.

    net: what is trained. balancer: weighs the tasks' losses by the gradients of the parameters `balanced`. retain, fade: see
    their files. All of them but `balanced` are children, so that their state is saved with the training.
    """

    def __init__(
        self,
        net: nn.Module,
        balancer: Balancer | None,
        balanced: Sequence[Tensor],
        retain: QualityRetaining | None,
        fade: RouterFade | None,
    ) -> None:
        super().__init__()
        self.net, self.balancer, self.retain, self.fade = net, balancer, retain, fade
        self._balanced = tuple(balanced)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def balance(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One scalar of the losses by task; needs a balancer."""
        return self.balancer.combine(losses, self._balanced)

    def remember(self, logits: Tensor, labels: Tensor) -> None:
        """A batch for the bank, which takes it with the next `step`: the losses before that see the bank as it is."""
        self._seen.append((logits.detach(), labels))

    def logged(self) -> dict[str, Tensor]:
        """ "weight/<task>", a balancer's alpha of the last batch, and "fade", a."""
        found = (
            {}
            if self.balancer is None
            else {f"weight/{name}": value for name, value in self.balancer.last_alpha().items()}
        )
        return found if self.fade is None else {**found, "fade": self.fade.alpha.clone()}

    def step(self) -> None:
        """After an optimiser step: the bank takes the logits of all its batches, the fade goes one step on."""
        if self._seen:
            logits, labels = (torch.cat(parts) for parts in zip(*self._seen))
            self.retain.update(logits, labels)
            self._seen.clear()
        if self.fade is not None:
            self.fade.step()
