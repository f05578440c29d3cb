"""Certified accuracy at several l2 radii, and abstentions: `evaluate.certify` (vismt/robustness/smoothing.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from vismt.evaluation.sections import FEATURES
from vismt.robustness.smoothing import ABSTAINED, Smoothing
from vismt.storage.records import Field
from vismt.uncertainty.features import PIXELS, PROBABILITIES, Answers, Feature, Quantity, Rows
from vismt.uncertainty.intervals import LOWER, Condition

_RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@FEATURES.register("certify")
class Certify(Feature):
    """The smoothed classifier is right and certified at a radius, or it abstains."""

    key, needs = "certify", frozenset({PROBABILITIES, PIXELS})
    kind, default = Smoothing | None, None
    meaning = "certified accuracy by randomised smoothing, {sigma, samples, alpha}, or null for none."

    @property
    def label(self) -> str:
        """The text of the smoothed classifier, "smoothed 0.25"."""
        return f"smoothed {self.section.sigma:g}"

    def settings(self) -> Mapping[str, object]:
        return asdict(self.section)

    def fields(self, classes: int) -> dict[str, Field]:
        return {self.label: Field(ABSTAINED, classes - 1, whole=True), f"{self.label} radius": Field(0)}

    def columns(self, answers: Answers) -> dict[str, Tensor]:
        assert answers.net is not None and answers.images is not None  # of a job that provides PIXELS
        found, radii = self.section.certify(answers.net, answers.images, answers.keys)
        return {self.label: found, f"{self.label} radius": radii}

    def quantities(self) -> list[Quantity]:
        reached = [radius for radius in _RADII if radius <= self.section.largest]
        certified = [Condition(f"{self.label} certified l2 {r:g}", "certified", self.label, r) for r in reached]
        abstention = Condition(self.label, "certified", self.label)
        return [
            *(Quantity(condition, "accuracy", counts=True) for condition in certified),
            Quantity(abstention, "abstentions", better=LOWER, counts=True),
        ]

    def values(self, of: Quantity, rows: Rows, outside: Mapping[str, Rows]) -> Tensor:
        answers, radii = rows.column(self.label), rows.column(f"{self.label} radius")
        if of.condition.level is None:
            return (answers == ABSTAINED).double()
        return ((answers == rows.labels) & (radii >= of.condition.level)).double()
