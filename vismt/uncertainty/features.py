"""What a feature of an evaluation asks of the answers of a net, beside their accuracy.

A feature is written on answers: one row of logits for one image or text. The job that evaluates makes examples of answers: an
image is one answer, an episode is the mean over its queries. So one feature serves every job that provides what it needs
(vismt/evaluation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vismt.storage.records import Field
from vismt.uncertainty.intervals import HIGHER, SHARE, Better, Condition, Measure, Scale

# What a job may provide, with the reason for which a job without it has no feature that needs it.
PROBABILITIES, PIXELS = "probabilities", "pixels"
REASONS = {
    PROBABILITIES: "no answer of this job is a choice among classes",
    PIXELS: "the answers of this job do not come from pixels",
}


@dataclass(frozen=True)
class Answers:
    """The answers of a net to a batch of examples under no condition.

    Args:
        logits: (n, k), or log-probabilities.
        labels: int64 (n,).
        net: Images (m, 3, h, w) to logits (m, k), of a job that provides PIXELS.
        images: (n, 3, h, w) in [0, 1], of a job that provides PIXELS.
        keys: Of the examples, of which their random numbers are a function.
    """

    logits: Tensor
    labels: Tensor
    net: Callable[[Tensor], Tensor] | None = None
    images: Tensor | None = None
    keys: Sequence[tuple[int | str, ...]] = ()


@dataclass(frozen=True)
class Quantity:
    """A number for each answer, whose mean is a score.

    Args:
        condition: Condition of the score.
        metric: Name of the score.
        scale, better: As in `vismt.uncertainty.intervals.Measure`.
        counts: Whether every value is 0 or 1.
    """

    condition: Condition
    metric: str
    scale: Scale = SHARE
    better: Better = HIGHER
    counts: bool = False

    @property
    def field(self) -> str:
        """The name of the field of a record with the mean over an example of several answers."""
        return f"{self.condition.label} {self.metric}"

    def measure(self, values: Mapping[str, float], *, counts: bool) -> Measure:
        """Return the score of examples by name. counts: whether an example is one answer."""
        return Measure(self.metric, dict(values), self.scale, self.better, counts=self.counts and counts)


class Feature(ABC):
    """What the section `evaluate.KEY` of a configuration asks for.

    Attributes:
        key: Name of the section.
        needs: What a job has to provide.
        keys: A dataclass with the field `key`: its type, its default, which asks for nothing, and its meaning.
        section: The value of the key.
    """

    key: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    keys: ClassVar[type]

    def __init__(self, section: Any) -> None:
        self.section = section

    @abstractmethod
    def settings(self) -> Mapping[str, object]:
        """Return what the columns depend on, for the header of a record."""

    @abstractmethod
    def fields(self, classes: int) -> dict[str, Field]:
        """Return the fields of `columns` in a record. classes: number of logits, which the names do not depend on."""

    @abstractmethod
    def columns(self, answers: Answers) -> dict[str, Tensor]:
        """Return what is recorded of each answer, by field."""

    @abstractmethod
    def quantities(self) -> list[Quantity]:
        """Return the scores."""

    @abstractmethod
    def values(self, columns: Mapping[str, Tensor], labels: Tensor) -> list[Tensor]:
        """Return the values fp64 (n,) of each of `quantities`. columns: of n answers, fp64. labels: fp64 (n,)."""

    def means(self, answers: Answers) -> dict[str, float]:
        """Return the mean of each quantity over the answers of one example, by field."""
        columns = {name: values.double() for name, values in self.columns(answers).items()}
        values = self.values(columns, answers.labels.double())
        return {of.field: float(found.mean()) for of, found in zip(self.quantities(), values, strict=True)}

    def measures(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Condition, Measure]]:
        """Return the scores from rows with an id, a label and the columns of one answer each."""

        def column(name: str) -> Tensor:
            return torch.tensor([row[name] for row in rows], dtype=torch.float64)

        values = self.values({name: column(name) for name in self.fields(1)}, column("label"))
        ids = [str(row["id"]) for row in rows]
        return [
            (of.condition, of.measure(dict(zip(ids, found.tolist(), strict=True)), counts=True))
            for of, found in zip(self.quantities(), values, strict=True)
        ]

    def rows(self, ids: Sequence[str], answers: Answers) -> list[dict[str, Any]]:
        """Return rows as `measures` takes them, from answers that are on record."""
        columns = {name: values.tolist() for name, values in self.columns(answers).items()}
        columns |= {"id": list(ids), "label": answers.labels.tolist()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
