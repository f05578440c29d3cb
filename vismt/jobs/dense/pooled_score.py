"""A pooled score of many images, and the effect of each image on it.

Scores of dense tasks are not means over images: counts and errors of all pixels are added up and the score is computed from the
sums. The jackknife gives it an interval over images nevertheless. With theta of all n images and theta_i of all but image i,

    psi_i = theta + (n - 1) (mean_j theta_j - theta_i)     mean_i psi_i = theta     var = sum (psi_i - theta)^2 / n (n - 1)

so psi_i (Tukey's pseudo-values, centred on theta) may be treated as if the score were their mean: intervals, paired differences
of two models on the same images, averages over trainings. Correct to first order for scores that are smooth in the images'
weights, as all scores of the tasks are but for a jump of the best threshold; not for a median. The interval covers the choice of
images, not of pixels within an image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.tasks import Task
from vismt.multitask.tasks.classes import Classification
from vismt.robustness.evaluate import probability_columns
from vismt.uncertainty.intervals import CLEAN

# Numbers of a state kept for each image; the histogram of angles has more, and no score is read from it.
_LARGEST = 100_000


class Undefined(UserError):
    """A score that is not a finite number."""


State = dict[str, Tensor]  # what a metric has counted on one image, by the metric's names; empty for an image left out


@dataclass(frozen=True)
class Scored:
    """A pooled score.

    Args:
        value: the score of all images.
        numbers: everything that the metric computes, None in the place of NaN (a class that is nowhere), which JSON lacks.
        images: psi by image.
        further: psi by image of the other numbers of the task, by their keys. A number that is undefined, also without one
            image (the IoU of a class that a single image has), is left out.
        alone: score of each image as if it were the whole set, None where it has none.
        answers: of a task of whole images, class, label and probabilities by image, as `probability_columns` names them.
        examples: as in `vismt.report.results.Result`.
    """

    value: float
    numbers: dict[str, Any]
    images: dict[str, float]
    further: dict[str, dict[str, float]]
    alone: dict[str, float | None]
    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: str = ""

    def record(self) -> dict[str, Any]:
        """Return the fields as they are recorded; tasks of maps have no answers."""
        return {name: value for name, value in asdict(self).items() if name not in ("answers", "examples") or value}


def read_scored(values: Any, what: str) -> Scored:
    """Return a score from its fields as they were recorded. Raises UserError for others, and for values not finite."""
    try:
        scored = Scored(**values)
        psi = [value for values in (scored.images, *scored.further.values()) for value in values.values()]
        numbers = [scored.value, *psi, *(v for v in scored.alone.values() if v is not None)]
        finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    except (TypeError, AttributeError):
        finite = False
    if not finite:
        raise UserError(
            f"{what} does not hold a score of finite numbers; move the file away, and it is evaluated again."
        )
    return scored


class PooledScore:
    """Collects the images of one task under a condition; images without a valid pixel are left out.

    quantile: largest -log p of a class in a conformal set; None for no sets.
    """

    def __init__(self, task: Task, condition: str = CLEAN.label, quantile: float | None = None) -> None:
        self.task, self.condition, self.quantile = task, condition, quantile
        self.answers: dict[str, dict[str, float]] = {}
        self._states: dict[str, State] = {}
        self._total: State = {}

    def state(self, prediction: Tensor, target: Tensor) -> State:
        """Return the state of one image, with a batch dimension of 1, at the target's size.

        Arguments and errors as Task.update.
        """
        if not bool(self.task.valid(target).any()):
            return {}
        metric = self.task.metric()
        self.task.update(metric, prediction, target)
        return {key: value.clone() for key, value in cast("State", metric.metric_state).items()}

    def answer(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Return the entry of `answers` of one image, {} for a map and for an image without a label; arguments as of `state`."""
        if not isinstance(self.task, Classification) or not bool(self.task.valid(target).any()):
            return {}
        place = self.task.placed(target)
        columns = probability_columns(self.condition, prediction.double(), place, self.quantile)
        return {"label": int(place), **{name: values[0] for name, values in columns.items()}}

    def add(self, name: str, state: State, answer: dict[str, float] | None = None) -> None:
        if answer:
            self.answers[name] = answer
        if state:
            self._total = {key: value + self._total.get(key, 0) for key, value in state.items()}
            self._states[name] = {key: value for key, value in state.items() if value.numel() <= _LARGEST}

    def value(self) -> float:
        """Return the score of all images without more; -1 where it is not finite."""
        score = self.task.score(self._compute(self._total)) if self._states else math.nan
        return score if math.isfinite(score) else -1.0

    def result(self) -> Scored:
        """Return the score. Raises Undefined for one that is not finite, UserError for one that rests on less than two images."""
        n = len(self._states)
        if n < 2:
            raise UserError(f"evaluate: {n} image(s) with a value for {self.task.name}; an interval needs two or more.")
        numbers = self._compute(self._total)
        values, measure = self.task.values(numbers), self.task.measure
        without, alone = {}, {}
        for name, states in self._states.items():
            try:
                rest = self._compute({key: total - states.get(key, 0) for key, total in self._total.items()})
            except UserError as error:
                raise UserError(f"evaluate: {self.task.name} rests on image '{name}' alone ({error}).") from error
            without[name] = self.task.values(rest)
            alone[name] = self._alone(states)
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
        return Scored(value, writable, effects.pop(measure), effects, alone, self.answers)

    def _compute(self, states: Mapping[str, Tensor]) -> dict[str, Any]:
        metric = self.task.metric()
        metric.distributed_available_fn = lambda: False  # the states are those of all processes
        for key, value in states.items():
            setattr(metric, key, value)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # its states come without an update
            return metric.compute()

    def _alone(self, states: Mapping[str, Tensor]) -> float | None:
        """Return the score of an image as if it were the whole set, None where it has none (no boundary in it, say)."""
        try:
            score = self.task.score(self._compute({**self._total, **states}))
        except UserError:
            return None
        return score if math.isfinite(score) else None


def _pseudo_values(value: float, without: Mapping[str, float]) -> dict[str, float]:
    """Return psi by image. without: the number without each image."""
    n = len(without)
    mean = sum(without.values()) / n
    return {name: value + (n - 1) * (mean - other) for name, other in without.items()}


def _writable(number: Any) -> Any:
    if isinstance(number, list):
        return [_writable(item) for item in number]
    return None if isinstance(number, float) and math.isnan(number) else number
