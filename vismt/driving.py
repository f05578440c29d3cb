"""Adapted models in the training loops of other packages: what their methods need as training goes on.

The callbacks for transformers (hf.py) and Lightning (lightning.py) use it, and so may a loop of one's own:

    driver = MethodDriver(model)
    optimizer = driver.wrap(torch.optim.AdamW(...))           # Landing around it, where the method has one
    driver.start(optimizer, steps=1000)
    for step in range(1, 1001):
        ...                                                   # forward, backward, optimizer.step()
        driver.on_step(step)                                  # LISA's layers, the fading of routers
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vismt.engine.checkpoint import moving_state
from vismt.errors import UserError
from vismt.lowrank.record import need_record
from vismt.methods import Schedule, adapted_models, method_optimizer, schedules


class MethodDriver:
    """The schedules and optimisers of the methods of an adapted model.

    Args:
        model: adapted, or with an adapted part.
        sections: settings of schedules by the name that they have in a configuration, such as fade=FadeConfig(0.0, 0.5).

    Raises:
        UserError: a model without an adapted part.
    """

    def __init__(self, model: nn.Module, **sections: Any) -> None:
        self.adapted = adapted_models(model)
        if not self.adapted:
            raise UserError(f"{type(model).__name__} is not adapted; call vismt.adapt before the training starts.")
        self.model = model
        self.sections = SimpleNamespace(**sections)
        self.schedules: list[Schedule] = []
        self._wrapped: Optimizer | None = None

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimiser inside those that the methods need; an optimiser that was wrapped before as it is."""
        if optimizer is not self._wrapped:
            self._wrapped = method_optimizer(optimizer, self.model)
        return self._wrapped

    def start(self, optimizer: Optimizer, steps: int, finished: int = 0) -> None:
        """Get ready for the first step; warn of schedules without settings.

        optimizer: that training steps. steps: optimiser steps of the whole training. finished: steps before a resume.
        """
        self.schedules = schedules(self.model, optimizer, steps, self.sections)
        for _, method in self.adapted:
            if method.section is not None and getattr(self.sections, method.section, None) is None:
                warnings.warn(
                    f"'{method.name}' has a schedule that nothing drives; give its settings as {method.section}=...",
                    stacklevel=2,
                )
        self.on_step(finished)

    def on_step(self, finished: int) -> None:
        """Get ready for the next step after `finished` optimiser steps."""
        for schedule in self.schedules:
            schedule.on_step(finished)

    def warn_of_optimizers(self, reason: str) -> None:
        """Warn where a method needs an optimiser around the one of training, which cannot be put there."""
        for _, method in self.adapted:
            if method.optimizer is not None:
                warnings.warn(f"'{method.name}' needs its own optimiser, which is not driven: {reason}.", stacklevel=3)

    def moving(self) -> dict[str, Tensor]:
        """Return what training may change of the model's state dict."""
        trained = [
            part.get_parameter(name) for part, _ in self.adapted for name in need_record(part, "training").also_train
        ]
        return moving_state(self.model, trained)
