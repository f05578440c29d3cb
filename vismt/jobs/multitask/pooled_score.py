"""A pooled score of many images, and the effect of each image on it.

Scores of maps are not means over images. Counts and errors of all pixels are added up, and the score is computed from the sums.
The jackknife nevertheless gives the score an interval over images. With theta of all n images and theta_i of all but image i,

    psi_i = theta + (n - 1) (mean_j theta_j - theta_i)     mean_i psi_i = theta     var = sum (psi_i - theta)^2 / n (n - 1)

Therefore the score may be treated as the mean of the psi_i (Tukey's pseudo-values, centred on theta) for intervals, paired
differences of two models on the same images, and averages over trainings. This is correct to first order for scores that are
smooth in the weights of the images. All scores of the tasks are smooth, except for a jump of the best threshold. A median is
not. The interval covers the choice of images, not of pixels within an image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.evaluation.quality import Quality
from vismt.multitask.tasks import Task
from vismt.multitask.tasks.classes import Classification
from vismt.robustness.conditions import DensePerturbation
from vismt.storage.files import JsonObject
from vismt.storage.records import Field, array_of, array_text
from vismt.uncertainty.features import Answers, Feature, Form, feature_columns, feature_fields, in_condition
from vismt.uncertainty.intervals import CLEAN

# Numbers of a state kept in memory for each image. The histogram of angles has more, and no score is read from it.
_LARGEST = 100_000


_PROBABILITIES = Quality(None)  # of the answers of whole images, whose panels show them


class Undefined(UserError):
    """A score that is not a finite number."""


State = dict[str, Tensor]  # counts of a metric on one image, by the metric's names


@dataclass(frozen=True)
class Scored:
    """A pooled score.

    Args:
        value: Score of all images.
        numbers: Everything that the metric computes. None stands for NaN (a class that no image has), which JSON lacks.
        images: psi by image.
        further: psi by image of the other numbers of the task, by their keys. A number that is undefined, or undefined without
            one image (the IoU of a class that a single image has), is left out.
        examples: Field of `vismt.report.results.Result`.
    """

    value: float
    numbers: JsonObject
    images: dict[str, float]
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: str = ""


class PooledScore:
    """Collects the rows of the images of one task under a condition. Images without a valid pixel are left out.

    condition: Text of the condition, which is in the fields of its rows. asked: Fitted features of the evaluation, for a task of
    whole images. spec: Attack or corruption of the condition. form: Form of the logits.

    Attributes:
        features: What is recorded of every answer.
        answers: Label and columns of features by image, for a task of whole images.
        path: Record of the images, set by the evaluation that reads the record.
        examples: Field of `Scored`, set by the evaluation that reads the record.
    """

    def __init__(
        self,
        task: Task,
        condition: str = CLEAN.label,
        asked: Sequence[Feature] = (),
        spec: DensePerturbation | None = None,
        form: Form | None = None,
    ) -> None:
        self.features = [_PROBABILITIES, *asked]
        self.task, self.condition, self.spec, self.form = task, condition, spec, form
        self.answers: dict[str, dict[str, float]] = {}
        self.path, self.examples = Path(), ""
        self._empty = cast("State", task.metric().metric_state)
        self._states: dict[str, State] = {}
        self._total: State = {}
        self._fields = self.fields()

    def fields(self) -> dict[str, Field]:
        """Return the fields of the row of an image. An image without a valid pixel has none of them."""
        fields = in_condition(self.condition, {key: Field(array=of.numpy()) for key, of in self._empty.items()})
        if isinstance(self.task, Classification):
            fields["label"] = Field(whole=True)
            fields |= feature_fields([self.condition], self.features, self.task.outputs)
        return {f"{self.task.name} {key}": replace(values, optional=True) for key, values in fields.items()}

    def columns(
        self,
        prediction: Tensor,
        target: Tensor,
        net: Callable[[Tensor], Tensor] | None = None,
        image: Tensor | None = None,
        name: str = "",
    ) -> JsonObject:
        """Return the fields of one image, with a batch dimension of 1, at the target's size.

        net, image, name: Net, image and name of the image, for features. Other arguments and errors are as in Task.update.
        """
        if not bool(self.task.valid(target).any()):
            return {}
        metric = self.task.metric()
        prediction = prediction if self.form is None else self.form(prediction)
        self.task.update(metric, prediction, target)
        state = cast("State", metric.metric_state)
        found: JsonObject = in_condition(self.condition, {key: array_text(of.numpy()) for key, of in state.items()})
        if isinstance(self.task, Classification):
            place = self.task.placed(target)
            answers = Answers(prediction.double(), place, net, image, [(name,)])
            values = feature_columns(self.condition, self.features, answers)
            found |= {"label": int(place), **{key: value[0] for key, value in values.items()}}
        return {f"{self.task.name} {key}": value for key, value in found.items()}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of an image, with its id."""
        name, mine = row["id"], f"{self.task.name} "
        found = {key.removeprefix(mine): value for key, value in row.items() if key in self._fields}
        state = {
            key: torch.from_numpy(array_of(found.pop(f"{self.condition} {key}"), like.numpy()))
            for key, like in self._empty.items()
            if f"{self.condition} {key}" in found
        }
        if found:
            self.answers[name] = found
        if state:
            self._total = {key: value + self._total.get(key, 0) for key, value in state.items()}
            self._states[name] = {key: value for key, value in state.items() if value.numel() <= _LARGEST}

    @property
    def filled(self) -> bool:
        """Whether there is an image with a value."""
        return bool(self._states)

    def value(self) -> float:
        """Return only the score of all images. -1 if it is not finite."""
        score = self.task.score(self._compute(self._total)) if self._states else math.nan
        return score if math.isfinite(score) else -1.0

    def alone(self, name: str) -> float:
        """Return the score of an image as if it were the whole set. NaN if it has none, for example without a boundary."""
        if name not in self._states:
            return math.nan
        try:
            return self.task.score(self._compute({**self._total, **self._states[name]}))
        except UserError:
            return math.nan

    def result(self) -> Scored:
        """Return the score. Raises Undefined if it is not finite, and UserError if it rests on fewer than two images."""
        n = len(self._states)
        if n < 2:
            raise UserError(f"evaluate: {n} image(s) with a value for {self.task.name}; an interval needs two or more.")
        numbers = self._compute(self._total)
        values, measure = self.task.values(numbers), self.task.measure
        without = {}
        for name, state in self._states.items():
            try:
                rest = self._compute({key: total - state.get(key, 0) for key, total in self._total.items()})
            except UserError as error:
                raise UserError(f"evaluate: {self.task.name} rests on image '{name}' alone ({error}).") from error
            without[name] = self.task.values(rest)
        effects = {
            key: _pseudo_values(value, {name: others[key] for name, others in without.items()})
            for key, value in values.items()
            if all(map(math.isfinite, (value, *(others[key] for others in without.values()))))
        }
        value = values[measure]
        if measure not in effects:
            raise Undefined(
                f"evaluate: the score of {self.task.name} is {value}, or is not finite without one image. With absent 'nan' a "
                "class that is nowhere takes the whole mean along; use 'zero' or 'skip'."
            )
        writable = {key: _writable(number) for key, number in numbers.items()}
        return Scored(value, writable, effects.pop(measure), effects, self.examples)

    def _compute(self, states: Mapping[str, Tensor]) -> JsonObject:
        metric = self.task.metric()
        metric.distributed_available_fn = lambda: False  # the states already cover all processes
        for key, value in states.items():
            setattr(metric, key, value)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # its states come without an update
            return metric.compute()


def _pseudo_values(value: float, without: Mapping[str, float]) -> dict[str, float]:
    """Return psi by image. without: Number without each image."""
    n = len(without)
    mean = sum(without.values()) / n
    return {name: value + (n - 1) * (mean - other) for name, other in without.items()}


def _writable(number: Any) -> Any:
    if isinstance(number, list):
        return [_writable(item) for item in number]
    return None if isinstance(number, float) and math.isnan(number) else number
