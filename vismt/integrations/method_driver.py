"""What methods need as training goes on, for the training loops of other packages.

The callbacks for transformers (hf.py) and Lightning (lightning.py) use it. A loop that you write can use it too:

    driver = MethodDriver(model)
    optimizer = driver.wrap(torch.optim.AdamW(...))           # Landing around it, where the method has one
    driver.start(optimizer, steps=1000)
    for step in range(1, 1001):
        ...                                                   # forward, backward, optimizer.step()
        driver.on_step(step)                                  # LISA's layers, the fading of routers
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn
from torch.optim import Optimizer

from vismt.base.errors import UserError
from vismt.base.identity import Identity
from vismt.engine.checkpoint import moving_state
from vismt.lowrank.files.description import entry_of, module_entries
from vismt.lowrank.files.save_load import base_samples, same_base
from vismt.lowrank.model.record import need_record
from vismt.methods import Schedule, adapted_models, method_optimizer, schedules
from vismt.storage.files import JsonObject


class MethodDriver:
    """The schedules and optimisers of the methods of a model that is adapted or has an adapted part.

    Args:
        sections: Settings of schedules by the schedules' names in a configuration, such as fade=FadeConfig(0.0, 0.5).

    Raises:
        UserError: The model is not adapted and has no adapted part.
    """

    def __init__(self, model: nn.Module, **sections: object) -> None:
        self.adapted = adapted_models(model)
        if not self.adapted:
            raise UserError(f"{type(model).__name__} is not adapted; call vismt.adapt before the training starts.")
        self.model = model
        self.sections = SimpleNamespace(**sections)
        self.schedules: list[Schedule] = []
        self._wrapped: Optimizer | None = None

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimiser inside the optimisers that the methods need.

        An optimiser that is already wrapped is returned as it is.
        """
        if optimizer is not self._wrapped:
            self._wrapped = method_optimizer(optimizer, self.model)
        return self._wrapped

    def start(self, optimizer: Optimizer, steps: int, finished: int = 0) -> None:
        """Get ready for the first step, and warn of schedules without settings.

        Args:
            optimizer: Optimiser of the training.
            steps: Number of optimiser steps of the whole training.
            finished: Number of steps before a resume.
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
        """Warn of methods that need an optimiser around the training's optimiser, where none can be put."""
        for _, method in self.adapted:
            if method.optimizer is not None:
                warnings.warn(f"'{method.name}' needs its own optimiser, which is not driven: {reason}.", stacklevel=3)

    def moving(self) -> dict[str, Tensor]:
        """Return the names of the entries of the model's state dict that training may change."""
        trained = [
            part.get_parameter(name) for part, _ in self.adapted for name in need_record(part, "training").also_train
        ]
        return moving_state(self.model, trained)

    def belonging(self) -> list[JsonObject]:
        """Return for each adapted part what the tensors of a checkpoint belong to, in the form of JSON.

        It is the base, the method and its settings. The adapted weights of the base are sampled, as in the files of adapters. A
        start such as PiSSA's changes these weights, and another machine rounds them otherwise. All other frozen weights count
        with every bit.
        """
        parts = []
        for part, _ in self.adapted:
            record = need_record(part, "training")
            samples = base_samples(part, [spec.path for spec in record.layers])
            adapted = tuple(f"{spec.path}." for spec in record.layers)
            frozen = {
                name: value
                for name, value in part.named_parameters()
                if not (value.requires_grad or name in record.also_train or name.startswith(adapted))
            }
            about = {
                "method": record.method,
                "options": record.options,
                "layers": [entry_of(spec) for spec in record.layers],
                "also_train": sorted(record.also_train),
                "parts": module_entries(record.specs),
                "base": str(Identity(*(item for pair in sorted(frozen.items()) for item in pair))),
                "base_samples": samples,
            }
            parts.append(json.loads(json.dumps(about)))
        return parts

    @staticmethod
    def check_resumed(saved: Sequence[JsonObject], present: Sequence[JsonObject]) -> None:
        """Raise UserError if a checkpoint belongs to another base, method or settings. `belonging` returns both arguments."""
        if len(saved) != len(present):
            raise UserError(f"resume: the checkpoint is of {len(saved)} adapted parts, this model has {len(present)}.")
        for old, new in zip(saved, present):
            for key in ("method", "layers", "options", "also_train", "parts"):
                if old.get(key) != new[key]:
                    raise UserError(
                        f"resume: the checkpoint is of an adapter with another {_difference(key, old.get(key), new[key])}; "
                        "adapt the model as for that training, or start without a checkpoint."
                    )
            if old["base"] != new["base"] or not same_base(new["base_samples"], old["base_samples"]):
                raise UserError(
                    "resume: the checkpoint is of another base model (frozen weights differ); load the base of that training, "
                    "or start without a checkpoint."
                )


class DriverCallback:
    """What the callbacks of the two Trainers share: the driver of the model, and what the checkpoints belong to.

    Args:
        sections: Settings of schedules by the schedules' names in a configuration, such as fade=FadeConfig(0.0, 0.5) for emtal.
    """

    def __init__(self, **sections: object) -> None:
        self._sections = sections
        self._driver: MethodDriver | None = None
        self.belongs: list[JsonObject] = []

    def drive(self, model: nn.Module) -> None:
        """Make the driver, before a checkpoint is loaded."""
        self._driver = MethodDriver(model, **self._sections)
        self.belongs = self._driver.belonging()

    @property
    def driver(self) -> MethodDriver:
        """The driver of the model. UserError is raised if the callback was not there when the training was set up."""
        if self._driver is None:
            raise UserError(
                "VismtCallback: give it to the Trainer as callbacks=[VismtCallback()], before the training."
            )
        return self._driver


def _difference(key: str, old: object, new: object) -> str:
    """Return the first difference of two values of JSON as text. It names the setting if the setting can be found."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in (*old, *new) if old.get(name) != new.get(name))
        return _difference(f"{key} {name}", old.get(name), new.get(name))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        first, second = next(pair for pair in zip(old, new) if pair[0] != pair[1])
        return _difference(key, first, second)
    shown = [text if len(text) <= 60 else f"{text[:57]}..." for text in (str(old), str(new))]
    return f"{key} ({shown[0]}, this model has {shown[1]})"
