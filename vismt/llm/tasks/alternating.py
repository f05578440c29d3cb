"""The objective of PoLAR-VBLL's alternating steps: the posterior moves on fixed features, then the LM under the posterior.

See vismt.llm.alternating. The posterior has an Adam of its own, whose moments are buffers, so that they are saved with the
training and resumed bit for bit; the training loop's optimiser finds no gradient on it and leaves it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.errors import UserError
from vismt.llm.alternating import alternating_loss
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks.base import LmObjective
from vismt.llm.tasks.classes import Classes
from vismt.llm.variational import VariationalHead

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class AlternatingObjective(LmObjective):
    """lr, spread_lr: of the posterior's means and noise, and of its covariances; steps: of the posterior for each batch.

    Raises UserError for a head that is no variational one.
    """

    def __init__(self, net: LmNet, task: Classes, lr: float, spread_lr: float, steps: int) -> None:
        super().__init__(net, task)
        if not isinstance(net.head, VariationalHead):
            raise UserError(
                "head.alternate: needs a variational posterior; set head.name to vbll, or alternate to null."
            )
        self.rates, self.steps = (lr, spread_lr), steps
        self._own: torch.optim.Adam | None = None
        for number, parameter in enumerate(net.head.parameters()):
            for name in MOMENTS:
                start = torch.zeros(()) if name == "step" else torch.zeros_like(parameter)
                self.register_buffer(f"{name}{number}", start)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.net.features(batch)
        loss = alternating_loss(self.net.head, self._optimizer(), features, batch["label"], self.steps)
        return {"loss": loss, "kl": self.net.head.kl().detach()}

    def _optimizer(self) -> torch.optim.Adam:
        """Made at the first batch: by then the module is on its device and the moments of a resumed run are in the buffers."""
        if self._own is None:
            self._own = torch.optim.Adam(self.net.head.parameter_groups(*self.rates))
            for number, parameter in enumerate(self.net.head.parameters()):
                self._own.state[parameter] = {name: getattr(self, f"{name}{number}") for name in MOMENTS}
        return self._own
