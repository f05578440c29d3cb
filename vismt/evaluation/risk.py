"""Conformal sets and selective prediction, with thresholds from clean validation examples: `evaluate.risk`.

vismt/uncertainty/conformal.py has the threshold of sets that contain the label with _COVERAGE. vismt/uncertainty/selective.py
has the confidence above which _SHARE of the answers lie. Coverage, size of the sets, accepted share, risk among accepted
answers and AURC are measures of every condition, clean, corrupted or attacked, from the record of every example.

Under an attack the convention of accuracies holds (vismt/robustness/evaluate.py): an answer counts as right, and a label as
covered, only if this also holds for the clean image. Sizes and confidences are of the attacked image. Our attacks stop at wrong
answers, when the label is often still in the set. `torchattacks:PGD` raises -log p, the score of the sets, to its last step.

Examples that chose a learning rate are not exchangeable with later examples. If 50 examples choose the best of five equal rates
and also give the threshold, the sets have a coverage of 87 to 88 %. With `tune`, one half of the validation examples therefore
chooses the rates and the other half gives the thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vismt.base.errors import UserError
from vismt.evaluation.sections import FEATURES
from vismt.storage.records import SHARE, Field
from vismt.uncertainty.conformal import conformal_quantile, least_examples, set_sizes
from vismt.uncertainty.features import PROBABILITIES, VALIDATION, Answers, Feature, Rows, Summary, View
from vismt.uncertainty.intervals import CLEAN, LOWER, NUMBER, Estimate, Measure, Score, group_index, wilson
from vismt.uncertainty.probability_metrics import largest_probability, proper_scores
from vismt.uncertainty.selective import (
    accepting_threshold,
    risk_coverage_interval,
    risk_coverage_values,
    selective_risk,
)

_COVERAGE, _SHARE = 0.9, 0.8  # share of covered labels, share of accepted answers
COVERED, SIZE, ACCEPTED, RISK, AURC = "coverage of sets", "classes in a set", "accepted", "selective risk", "AURC"
_NOTE = (
    "Coverage: share of sets that contain the label, 90 % where examples are exchangeable with the validation examples that "
    "set the threshold. Accepted: answers with a confidence that 80 % of the validation answers have; the selective risk is "
    "the error among them. AURC: error averaged over all thresholds of the confidence. Under an attack an answer is right, and "
    "a label covered, when it is so on the clean image, too. Several corruptions have their least and largest value."
)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds from n validation examples: of -log p for sets, of confidences for answers."""

    quantile: float
    confidence: float
    n: int


def fit_thresholds(nlls: Tensor, confidences: Tensor) -> Thresholds:
    """Return the thresholds of clean examples from -log p of their labels (n,) and their largest probabilities (n,)."""
    _need_examples(len(nlls))
    return Thresholds(conformal_quantile(nlls, _COVERAGE), accepting_threshold(confidences, _SHARE), len(nlls))


def _need_examples(count: int) -> None:
    least = least_examples(_COVERAGE)
    if count < least:
        raise UserError(
            f"evaluate.risk: {count} validation examples for the thresholds, which need {least} at least; with tune, half of "
            "the validation examples choose the rate. Take a larger validation share."
        )


@FEATURES.register("risk")
class Risk(Feature):
    """Sets of classes and accepted answers by thresholds of validation examples."""

    key, needs = "risk", frozenset({PROBABILITIES, VALIDATION})
    meaning = (
        "also evaluate conformal sets and selective prediction (vismt.evaluation.risk). With tune, half of the validation "
        "examples choose the rates and the other half give the thresholds."
    )
    everywhere = holds_out = True
    summary = Summary("Risk", "Thresholds from clean validation examples", (COVERED, SIZE, ACCEPTED, RISK, AURC), _NOTE)

    def __init__(self, section: Any, thresholds: Thresholds | None = None) -> None:
        super().__init__(section)
        self.thresholds = thresholds

    @property
    def quantile(self) -> float | None:
        return None if self.thresholds is None else self.thresholds.quantile

    def fitted(self, view: View) -> Risk:
        def fit() -> Thresholds:
            rows = view.held_out(self)
            return fit_thresholds(rows.column("nll"), rows.column("confidence"))

        return Risk(self.section, view.fitted(self.key, Thresholds, fit))

    def check_held_out(self, count: int) -> None:
        _need_examples(count)

    def settings(self) -> Mapping[str, object]:
        return {"quantile": self.quantile}

    def fields(self, classes: int) -> dict[str, Field]:
        sets = {} if self.quantile is None else {"set": Field(0, classes, whole=True)}
        return {"": Field(0, classes - 1, whole=True), "nll": Field(0), "confidence": SHARE, **sets}

    def columns(self, answers: Answers) -> dict[str, Tensor]:
        log_p = answers.logits.log_softmax(1)
        sets = {} if self.quantile is None else {"set": set_sizes(log_p, self.quantile)}
        nlls, confidences = proper_scores(log_p, answers.labels)[0], largest_probability(log_p)
        return {"": log_p.argmax(1), "nll": nlls, "confidence": confidences, **sets}

    def scores(self, view: View, rows: Rows, outside: Mapping[str, Rows]) -> list[Score]:
        assert self.thresholds is not None  # `fitted` was called
        quantile = self.thresholds.quantile

        def outcome(name: Any) -> tuple[Tensor, Tensor]:
            return rows.column("nll", name) <= quantile, rows.column("", name) == rows.labels

        clean, found = outcome(CLEAN), []
        for condition, strict in rows.asked:
            covered, right = outcome(condition)
            if strict:
                covered, right = covered & clean[0], right & clean[1]
            sizes, confidences = rows.column("set", condition), rows.column("confidence", condition)
            measures = self._measures(rows, covered.double(), sizes, confidences, (~right).double())
            found += [view.score(rows.grouped(measure), condition, rows.content) for measure in measures]
        return found

    def _measures(
        self, rows: Rows, covered: Tensor, sizes: Tensor, confidences: Tensor, wrong: Tensor
    ) -> list[Measure]:
        """Return the measures of one condition from values by example (n,) fp64, covered and wrong 0 or 1."""
        assert self.thresholds is not None

        def by_id(values: Tensor) -> dict[str, float]:
            return dict(zip(rows.ids, values.tolist(), strict=True))

        accepted = (confidences >= self.thresholds.confidence).double()
        measures = [
            Measure(COVERED, by_id(covered), counts=True),
            Measure(SIZE, by_id(sizes), NUMBER, LOWER),
            Measure(ACCEPTED, by_id(accepted), counts=True),
        ]
        risk = selective_risk(confidences, wrong, self.thresholds.confidence)
        if risk is not None:
            bounds = wilson(int((accepted * wrong).sum()), int(accepted.sum()))
            error = None if rows.groups else Estimate.within(float(risk.mean()), bounds)
            measures.append(Measure(RISK, by_id(risk), better=LOWER, error=error))
        area = risk_coverage_values(confidences, wrong)
        index = group_index([rows.groups[name] for name in rows.ids]) if rows.groups else None
        error = Estimate.within(float(area.mean()), risk_coverage_interval(confidences, wrong, index))
        return [*measures, Measure(AURC, by_id(area), better=LOWER, error=error, paired=False)]
