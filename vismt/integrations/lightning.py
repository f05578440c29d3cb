"""Adapted models in Lightning's Trainer: `Trainer(callbacks=[VismtCallback()])`."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vismt.base.errors import UserError
from vismt.integrations.method_driver import DriverCallback
from vismt.methods import adapted_models
from vismt.storage.files import JsonObject

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise UserError(
        "vismt.integrations.lightning: needs lightning, which is not installed: pip install lightning."
    ) from error


_BELONGS = "vismt"  # the key of what a checkpoint belongs to


class VismtCallback(DriverCallback, Callback):
    """What an adapted model needs in Lightning's Trainer.

    A checkpoint holds the trained tensors alone. `trainer.fit(..., ckpt_path=...)` continues from them on a module that is
    adapted in the same way. The callback runs the schedules of methods (LISA's layers, fading routers) and their optimisers
    (PoLAR's landing).

    Args:
        sections: Settings of schedules by the schedules' names in a configuration, such as fade=FadeConfig(0.0, 0.5) for emtal.

    Raises:
        UserError: The module has no adapted part when fitting starts, or a checkpoint belongs to another base, method or
            settings.
    """

    _finished = 0

    def setup(self, trainer: object, pl_module: nn.Module, stage: str) -> None:
        """Allow checkpoints without the frozen tensors, also in a test or prediction without a training before it."""
        if stage == "fit" or (self._driver is None and adapted_models(pl_module)):
            self.drive(pl_module)
            module: Any = pl_module
            module.strict_loading = False

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        driver = self.driver
        if str(getattr(trainer, "precision", "")).startswith("16"):
            driver.warn_of_optimizers("fp16 scales the gradients; train with bf16")
        else:
            trainer.strategy.optimizers = [driver.wrap(optimizer) for optimizer in trainer.strategy.optimizers]
        self._finished = trainer.global_step
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):  # limited by time alone
            if vars(driver.sections):
                names = ", ".join(vars(driver.sections))
                raise UserError(f"VismtCallback: {names} is a schedule over all steps; give the Trainer max_steps.")
            steps = 0
        driver.start(trainer.strategy.optimizers[0], int(steps), self._finished)

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step != self._finished:
            self._finished = trainer.global_step
            self.driver.on_step(self._finished)

    def on_save_checkpoint(self, trainer: object, pl_module: nn.Module, checkpoint: JsonObject) -> None:
        moving = self.driver.moving()
        checkpoint[_BELONGS] = self.belongs
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in moving}

    def on_load_checkpoint(self, trainer: object, pl_module: nn.Module, checkpoint: JsonObject) -> None:
        if self._driver is not None:
            self._driver.check_resumed(checkpoint.get(_BELONGS, self.belongs), self.belongs)
