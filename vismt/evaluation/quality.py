"""Calibration error, NLL and Brier score of the clean probabilities, in all forms of the logits (no key asks for them)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vismt.storage.records import Field
from vismt.uncertainty.features import PROBABILITIES, Answers, Feature, Rows, View
from vismt.uncertainty.intervals import Measure, Score
from vismt.uncertainty.probability_metrics import MEASURES, example_measures, example_values

ACCURACY = "accuracy"


class Quality(Feature):
    """The measures of `vismt.uncertainty.probability_metrics`. A form that changes answers has an accuracy instead."""

    key, needs, of_forms = "quality", frozenset({PROBABILITIES}), True

    def fields(self, classes: int) -> dict[str, Field]:
        return {"": Field(0, classes - 1, whole=True), **{one.column: one.field for one in MEASURES}}

    def columns(self, answers: Answers) -> dict[str, Tensor]:
        log_p = answers.logits.log_softmax(1)
        return {"": log_p.argmax(1), **example_values(log_p, answers.labels)}

    def scores(self, view: View, rows: Rows, outside: Mapping[str, Rows]) -> list[Score]:
        found = []
        for condition, decides in rows.forms.items():
            right = (rows.column("", condition) == rows.labels).double()
            if decides:
                measures = [Measure(ACCURACY, dict(zip(rows.ids, right.tolist(), strict=True)), counts=True)]
            else:
                values = {of.column: rows.column(of.column, condition) for of in MEASURES}
                measures = example_measures(rows.ids, values, right, rows.groups)
            found += [view.score(rows.grouped(measure), condition, rows.content) for measure in measures]
        return found
