"""The objective of PoLAR-VBLL's alternating steps: update the posterior on fixed features, then the LM under the posterior.

See `alternating_loss` of vismt.uncertainty.vbll. The posterior has a separate Adam optimiser, whose moments are buffers, so
that they are saved with the training and resumed bit for bit; the optimiser of the training loop finds no gradient on the
posterior and skips it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks.base import LmObjective
from vismt.llm.tasks.classes import Classes
from vismt.uncertainty.vbll import VBLLClassifier, alternating_loss

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class AlternatingObjective(LmObjective):
    """The objective.

    Args:
        net: the LM with a variational head.
        task: the classification task.
        lr: learning rate of the posterior's means and noise.
        spread_lr: learning rate of the posterior's covariances.
        steps: updates of the posterior for each batch.

    Raises:
        UserError: the head is not variational.
    """

    def __init__(self, net: LmNet, task: Classes, lr: float, spread_lr: float, steps: int) -> None:
        super().__init__(net, task)
        if not isinstance(net.head, VBLLClassifier):
            raise UserError(
                "head.alternate: needs a variational posterior; set head.name to vbll, or alternate to null."
            )
        self.rates = (lr, spread_lr)
        self.steps = steps
        self._adam: torch.optim.Adam | None = None
        for number, parameter in enumerate(net.head.parameters()):
            for name in MOMENTS:
                start = torch.zeros(()) if name == "step" else torch.zeros_like(parameter)
                self.register_buffer(f"{name}{number}", start)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.net.features(batch)
        loss = alternating_loss(self.net.head, self._optimizer(), features, batch["label"], self.steps)
        return {"loss": loss, "kl": self.net.head.kl().detach()}

    def _optimizer(self) -> torch.optim.Adam:
        """Return the optimiser of the posterior, created at the first batch.

        Then the module is on its device and the buffers hold the moments of a resumed run.
        """
        if self._adam is None:
            self._adam = torch.optim.Adam(self.net.head.parameter_groups(*self.rates))
            for number, parameter in enumerate(self.net.head.parameters()):
                self._adam.state[parameter] = {name: getattr(self, f"{name}{number}") for name in MOMENTS}
        return self._adam
