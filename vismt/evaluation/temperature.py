"""Probabilities softmax(z / T), T fitted on validation examples (vismt/uncertainty/temperature.py): `evaluate.temperature`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vismt.evaluation.sections import FEATURES
from vismt.uncertainty.features import PROBABILITIES, VALIDATION, Feature, Form, View
from vismt.uncertainty.intervals import Condition
from vismt.uncertainty.temperature import block_tempered, fit_block_temperatures, fit_temperature

TEMPERED = Condition("temperature of validation", "variant", "temperature")
TEMPERATURE_FILE = "temperature.json"  # beside exported weights
_ABSENT = -1e6  # logit of an absent choice in the fit, negligible at any T


@dataclass(frozen=True)
class Temperatures:
    """The temperature of each task of a net, from n validation examples."""

    temperature: list[float]
    n: int


@FEATURES.register("temperature")
class Temperature(Feature):
    """The clean logits, divided by the temperature of the task of the largest logit."""

    key, needs = "temperature", frozenset({PROBABILITIES, VALIDATION})
    meaning = (
        "also evaluate the probabilities with the temperature that minimises the NLL on validation examples, and write the "
        "temperature beside exported weights. Classes of images have it in reports if there are validation images."
    )
    costs_nothing = exported = True

    def __init__(
        self, section: Any, fitted: Temperatures | None = None, task_of_class: torch.Tensor | None = None
    ) -> None:
        super().__init__(section)
        self._fitted, self._task_of_class = fitted, task_of_class

    def fitted(self, view: View) -> Temperature:
        tasks = view.task_of_class

        def fit() -> Temperatures:
            logits, labels = (torch.cat(parts) for parts in zip(*((of.logits, of.labels) for of in view.validation())))
            logits = logits.clamp_min(_ABSENT)
            found = (
                [fit_temperature(logits, labels)] if tasks is None else fit_block_temperatures(logits, labels, tasks)
            )
            return Temperatures(found, len(labels))

        return Temperature(self.section, view.fitted(self.key, Temperatures, fit, of_net=True), tasks)

    @property
    def forms(self) -> Mapping[Condition, Form]:
        tasks = self._task_of_class
        if tasks is None:
            return {TEMPERED: lambda logits: logits / self._temperature[0]}
        return {TEMPERED: lambda logits: block_tempered(logits, self._temperature[tasks])}

    @property
    def _temperature(self) -> torch.Tensor:
        assert self._fitted is not None  # `fitted` was called
        return torch.tensor(self._fitted.temperature, dtype=torch.float64)

    def files(self) -> dict[str, bytes]:
        """Return temperature.json: one number, or the temperature of each class, of which the largest logit chooses."""
        of_class = None if self._task_of_class is None else self._temperature[self._task_of_class].tolist()
        about = {
            "temperature": self._temperature.item() if of_class is None else of_class,
            "probabilities": f"softmax(logits / {'temperature' if of_class is None else 'temperature[argmax(logits)]'})",
            "fitted_on": "validation",
        }
        return {TEMPERATURE_FILE: json.dumps(about).encode()}
