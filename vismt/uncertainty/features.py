"""Features of an evaluation: numbers beside the accuracy that are computed from the answers of a net.

A feature is written for answers. An answer is one row of logits for one image or text. The job that evaluates makes examples of
answers: an image is one answer, and an episode is the mean over its queries. One feature therefore serves every job that
provides what the feature needs (vismt/evaluation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vismt.storage.records import Field
from vismt.uncertainty.intervals import CLEAN, HIGHER, SHARE, Better, Condition, Measure, Scale, Score

# What a job may provide, with the reason for which a job without it has no feature that needs it.
PROBABILITIES, PIXELS, OUTSIDE = "probabilities", "pixels", "outside"
VALIDATION, HEAD, COUNTS = "validation", "head", "counts"
REASONS = {
    PROBABILITIES: "no answer of this job is a choice among classes",
    PIXELS: "the answers of this job do not come from pixels",
    OUTSIDE: "this job opens no sets of other classes",
    VALIDATION: "this job has no validation examples of the evaluated classes",
    HEAD: "the answers of this job do not come from a head over features",
    COUNTS: "this job counts no training examples of classes",
}
Fitted = TypeVar("Fitted")
Value = TypeVar("Value")
Form = Callable[[Tensor], Tensor]  # logits fp64 (n, k) on the CPU to logits of the same shape
# Arguments: the trained head, features (b, d) of the training examples in batches, features and labels of validation examples.
MakeHead = Callable[[nn.Module, list[Tensor], tuple[Tensor, Tensor]], nn.Module]


@dataclass(frozen=True)
class Answers:
    """The answers of a net to a batch of examples under one condition.

    Args:
        logits: Logits or log-probabilities (n, k).
        labels: Labels int64 (n,), 0 for examples of other classes.
        net: Function from images (m, 3, h, w) to logits (m, k), if the job provides PIXELS.
        images: Images (n, 3, h, w) in [0, 1], if the job provides PIXELS.
        keys: Keys of the examples. The random numbers of an example are a function of its key.
    """

    logits: Tensor
    labels: Tensor
    net: Callable[[Tensor], Tensor] | None = None
    images: Tensor | None = None
    keys: Sequence[tuple[int | str, ...]] = ()


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a net are to attacks and corruptions.

    Args:
        classes: Smallest number of classes of an answer.
        seed: Seed of attacks.
        tasks: Tasks of the net whose losses an attack raises. None for a classifier.
        source: Function that returns another model of the run by its name. None for a job without other models.
    """

    classes: int = 4
    seed: int = 0
    tasks: Sequence[str] | None = None
    source: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a record, and how their examples depend on each other.

    Args:
        rows: Rows with an id, a label and columns of each example. The name of a column begins with its condition, "clean nll".
        groups: Group by id, {} for independent examples.
        unit: What the groups are, in the plural.
        content: Text that tells the examples from others of the same names, "" if it is not known.
        asked: Conditions of inputs, each with whether an answer also has to be right on the clean example.
        forms: Forms of clean logits, each with whether it changes answers.
    """

    rows: Sequence[Mapping[str, Any]]
    groups: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    content: str = ""
    asked: Sequence[tuple[Condition, bool]] = ((CLEAN, False),)
    forms: Mapping[Condition, bool] = field(default_factory=lambda: {CLEAN: False})

    @cached_property
    def ids(self) -> list[str]:
        return [str(row["id"]) for row in self.rows]

    def column(self, name: str, condition: Condition = CLEAN) -> Tensor:
        """Return the values fp64 (n,) of a column under a condition. The column "" has the answers."""
        (key,) = in_condition(condition.label, {name: None})
        return torch.tensor([row[key] for row in self.rows], dtype=torch.float64)

    @property
    def labels(self) -> Tensor:
        """The labels fp64 (n,)."""
        return torch.tensor([row["label"] for row in self.rows], dtype=torch.float64)

    def beside(self, others: Rows) -> Rows:
        """Return the ids and groups of these examples and of the examples of another set, whose ids begin with "other"."""
        joined: dict[str, str] = {}
        if self.groups or others.groups:
            joined = {name: self.groups.get(name, name) for name in self.ids}
            joined |= {f"other {name}": f"other {others.groups.get(name, name)}" for name in others.ids}
        units = {self.unit, others.unit} - {""}
        ids = [{"id": name} for name in (*self.ids, *(f"other {name}" for name in others.ids))]
        content = f"{self.content} {others.content}" if self.content and others.content else ""
        return Rows(ids, joined, units.pop() if len(units) == 1 else "groups", content)

    def grouped(self, measure: Measure) -> Measure:
        """Return a measure of the examples with their groups."""
        return replace(measure, groups=self.groups, grouped_by=self.unit) if self.groups else measure


@dataclass(frozen=True)
class Quantity:
    """A number for each answer, whose mean is a score.

    Args:
        condition: Condition of the score.
        metric: Name of the score.
        scale, better, chance: Fields of `vismt.uncertainty.intervals.Measure`.
        counts: Whether every value is 0 or 1.
        outside: Entry of the set of other classes over which the score is also taken, "" for none.
    """

    condition: Condition
    metric: str
    scale: Scale = SHARE
    better: Better = HIGHER
    counts: bool = False
    chance: float | None = None
    outside: str = ""

    @property
    def field(self) -> str:
        """The name of the field of a record with the score of an example of several answers."""
        return f"{self.condition.label} {self.metric}"

    def measure(self, values: Mapping[str, float], *, counts: bool) -> Measure:
        """Return the score of examples by name. counts: Whether an example is one answer."""
        counts = self.counts and counts
        return Measure(self.metric, dict(values), self.scale, self.better, counts=counts, chance=self.chance)


@dataclass(frozen=True)
class Summary:
    """A table of a report with a row for each set, model and condition. metrics: Columns. note: Text below the table."""

    title: str
    caption: str
    metrics: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Validation:
    """The answers of a net to validation examples.

    Args:
        logits: Logits or log-probabilities (n, k).
        labels: Labels int64 (n,).
        fits: Whether an example chose no learning rate, bool (n,).
    """

    logits: Tensor
    labels: Tensor
    fits: Tensor


class View(ABC):
    """A trained net on one evaluated set, as a feature sees it. A job defines the methods of what it provides.

    Attributes:
        number: Place of the task of the set among the tasks of the net.
    """

    number: int = 0

    @abstractmethod
    def score(self, measure: Measure, condition: Condition, examples: str, about: str = "") -> Score:
        """Return a score of the net.

        examples: Text that tells its examples from others of the same names. about: Field of `Feature`.
        """

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        """Return what is fitted once for the weights and the validation examples (VALIDATION).

        kind: A dataclass of numbers. of_net: Whether it is the same for all sets of the net.
        """
        raise NotImplementedError

    def validation(self) -> list[Validation]:
        """Return the answers to the validation examples of each task of the net (VALIDATION)."""
        raise NotImplementedError

    def held_out(self, feature: Feature) -> Rows:
        """Return the columns of a feature of the validation examples of this task that chose no learning rate."""
        of = self.validation()[self.number]
        return rows_of([feature], Answers(of.logits[of.fits].double(), of.labels[of.fits]))

    def judged(self, forms: Mapping[float, Form]) -> dict[float, float]:
        """Return the score of the net on its validation examples with each form of the logits (VALIDATION).

        Larger is better. The score of choices is the mean accuracy over the tasks.
        """
        tasks = self.validation()

        def score(form: Form) -> float:
            right = [(form(of.logits).argmax(1) == of.labels).double().mean() for of in tasks]
            return float(torch.stack(right).mean())

        return {value: score(form) for value, form in forms.items()}

    @property
    def task_of_class(self) -> Tensor | None:
        """The task of each class of a net over several tasks, int64 (k,). None for one task."""
        return None

    @property
    def class_counts(self) -> list[int]:
        """The number of training examples of each class (COUNTS)."""
        raise NotImplementedError

    @property
    def head_shape(self) -> tuple[str, int, int]:
        """The name of the head, its classes and the width of its input (HEAD)."""
        raise NotImplementedError

    def with_head(self, name: str, make: MakeHead) -> list[Score]:
        """Return accuracy and quality of the probabilities of clean examples with another head (HEAD).

        name: Name of the head, for the names of records. Several views of one net make the head once.
        """
        raise NotImplementedError


class Feature:
    """What the section `evaluate.KEY` of a configuration asks for.

    Attributes:
        key: Name of the section.
        needs: What a job has to provide.
        kind: Type of the section.
        default: Value of the section that switches the feature off, or the function that makes it.
        meaning: Meaning of the section, in configurations and their reference.
        about: What the protocol of its scores says in place of the choice among classes, "" for the choice.
        everywhere: Whether the columns are also recorded under attacks and corruptions.
        of_inputs: Whether it adds `perturbations`.
        of_forms: Whether the columns are also recorded for all forms of the clean logits.
        decides: Whether `forms` change answers.
        costs_nothing: Whether a job with validation answers has the feature without being asked.
        exported: Whether it writes `files` beside exported weights.
        holds_out: Whether it is fitted on validation examples that choose no learning rate.
        summary: Table of the report with its metrics, None for none.
        section: Value of the key.
    """

    key: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    kind: ClassVar[Any] = bool
    default: ClassVar[Any] = False
    meaning: ClassVar[str] = ""
    about: ClassVar[str] = ""
    everywhere: ClassVar[bool] = False
    of_inputs: ClassVar[bool] = False
    of_forms: ClassVar[bool] = False
    decides: ClassVar[bool] = False
    costs_nothing: ClassVar[bool] = False
    exported: ClassVar[bool] = False
    holds_out: ClassVar[bool] = False
    summary: ClassVar[Summary | None] = None

    def __init__(self, section: Any) -> None:
        self.section = section

    @property
    def sets(self) -> Sequence[str]:
        """The entries of sets of other classes, cards or folders, that the section names."""
        return ()

    @property
    def models(self) -> Sequence[str]:
        """The names of other models of the run that it asks."""
        return ()

    def perturbations(self, inputs: Inputs) -> Sequence[Any]:
        """Return the attacks and corruptions that it adds (vismt.robustness.conditions). Raises UserError for unfit values."""
        return ()

    @property
    def quantile(self) -> float | None:
        """The largest -log p of a class in the set that a prediction shows, None for no set."""
        return None

    @property
    def forms(self) -> Mapping[Condition, Form]:
        """The forms of the clean logits that it adds, by condition."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Return the content of files beside exported weights, by name."""
        return {}

    def settings(self) -> Mapping[str, object]:
        """Return the settings on which the columns depend, for the header of a record."""
        return {}

    def fields(self, classes: int) -> dict[str, Field]:
        """Return the fields of `columns` in a record. classes: Number of logits. The names do not depend on it."""
        return {}

    def columns(self, answers: Answers) -> dict[str, Tensor]:
        """Return the recorded values of each answer, by field. Columns of one name in several features have the same values."""
        return {}

    def fitted(self, view: View) -> Feature:
        """Return the feature with the values that it fits on validation examples."""
        return self

    def check_held_out(self, count: int) -> None:
        """Raise UserError if it cannot be fitted on so many validation examples."""

    def quantities(self) -> list[Quantity]:
        """Return the scores that are means of values of answers. Only `scores` returns other scores."""
        return []

    def values(self, of: Quantity, rows: Rows, outside: Mapping[str, Rows]) -> Tensor:
        """Return the values fp64 (n,) of one of `quantities`, or (n + m,) with m examples of its set of other classes.

        outside: Columns of other sets by entry.
        """
        raise NotImplementedError

    def scores(self, view: View, rows: Rows, outside: Mapping[str, Rows]) -> list[Score]:
        """Return the scores of examples of one answer each. outside: Columns of sets of other classes by entry."""
        found = []
        for of in self.quantities():
            over = rows.beside(outside[of.outside]) if of.outside else rows
            values = dict(zip(over.ids, self.values(of, rows, outside).tolist(), strict=True))
            measure = replace(over.grouped(of.measure(values, counts=True)), ranks=bool(of.outside))
            found.append(view.score(measure, of.condition, over.content, self.about))
        return found

    def net_scores(self, views: Sequence[View]) -> list[Score]:
        """Return scores that do not follow from recorded answers. views: Views of one net, one for each evaluated set."""
        return []

    def means(self, answers: Answers, outside: Mapping[str, Answers]) -> dict[str, float]:
        """Return the score of the answers of one example for each quantity, by field. outside: Columns of other sets by entry."""
        rows = rows_of([self], answers)
        others = {of.outside: rows_of([self], outside[of.outside]) for of in self.quantities() if of.outside}
        return {of.field: float(self.values(of, rows, others).mean()) for of in self.quantities()}


def rows_of(features: Sequence[Feature], answers: Answers, ids: Sequence[str] = ()) -> Rows:
    """Return rows with the columns of features for clean answers. ids: Ids of the examples, by default their numbers."""
    columns = feature_columns(CLEAN.label, features, answers)
    columns |= {"id": list(ids) or [*range(len(answers.labels))], "label": answers.labels.tolist()}
    return Rows([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def feature_settings(features: Sequence[Feature]) -> dict[str, Mapping[str, object]]:
    """Return the settings of the features that have columns, by key, for the header of a record."""
    return {of.key: of.settings() for of in features if of.forms or of.fields(2)}


def feature_columns(condition: str, features: Sequence[Feature], answers: Answers) -> dict[str, list]:
    """Return what features record of answers under a condition of inputs, by their names in a record of several conditions."""
    if condition != CLEAN.label:
        return _columns(condition, [of for of in features if of.everywhere], answers)
    found = _columns(condition, features, answers)
    for at, form in _forms(features).items():
        changed = Answers(form(answers.logits), answers.labels)
        found |= _columns(at.label, [of for of in features if of.of_forms], changed)
    return found


def feature_fields(conditions: Iterable[str], features: Sequence[Feature], classes: int) -> dict[str, Field]:
    """Return the fields of `feature_columns` under conditions of inputs. classes: Number of logits."""
    found: dict[str, Field] = {}
    asked = {at.label: [of for of in features if of.of_forms] for at in _forms(features)}
    asked |= {label: [of for of in features if of.everywhere or label == CLEAN.label] for label in conditions}
    for label, recorded in asked.items():
        for feature in recorded:
            found |= in_condition(label, feature.fields(classes))
    return found


def _forms(features: Sequence[Feature]) -> dict[Condition, Form]:
    return {at: form for feature in features for at, form in feature.forms.items()}


def _columns(condition: str, features: Sequence[Feature], answers: Answers) -> dict[str, list]:
    found: dict[str, list] = {}
    for feature in features:
        found |= in_condition(condition, {name: of.tolist() for name, of in feature.columns(answers).items()})
    return found


def in_condition(condition: str, columns: Mapping[str, Value]) -> dict[str, Value]:
    """Return columns by their names in a record of several conditions, "clean nll". The column "" has the answers."""
    return {f"{condition} {name}".rstrip(): values for name, values in columns.items()}
