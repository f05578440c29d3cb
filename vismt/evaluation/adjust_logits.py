"""Logits z - tau log pi: `evaluate.adjust_logits`. pi has the classes' shares of the training labels.

vismt/multitask/class_loss.py has the method and its source. tau is the value of TAUS with the best score on validation examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vismt.evaluation.sections import FEATURES
from vismt.uncertainty.features import COUNTS, VALIDATION, Feature, Form, View
from vismt.uncertainty.intervals import Condition

ADJUSTED = Condition("logit adjustment of validation", "variant", "logit adjustment")
TAUS = tuple(tau / 4 for tau in range(9))  # tried factors of the log prior, 0 to 2


@dataclass(frozen=True)
class Adjustment:
    """The tau that was chosen, the smallest of equally good ones."""

    tau: float


@FEATURES.register("adjust_logits")
class AdjustLogits(Feature):
    """The score of the adjusted logits."""

    key, needs = "adjust_logits", frozenset({VALIDATION, COUNTS})
    meaning = (
        "whether logits minus tau log prior are also evaluated (vismt.multitask.class_loss). tau is chosen on the validation "
        "images, one for all tasks of whole images, or with `size` one for each task with classes."
    )
    decides = True

    def __init__(self, section: Any, tau: float = 0.0, counts: Sequence[int] = ()) -> None:
        super().__init__(section)
        self._tau, self._counts = tau, counts

    def fitted(self, view: View) -> AdjustLogits:
        counts = view.class_counts

        def fit() -> Adjustment:
            scores = view.judged({tau: _form(counts, tau) for tau in TAUS})
            return Adjustment(max(TAUS, key=scores.__getitem__))

        return AdjustLogits(self.section, view.fitted(self.key, Adjustment, fit, of_net=True).tau, counts)

    @property
    def forms(self) -> Mapping[Condition, Form]:
        return {ADJUSTED: _form(self._counts, self._tau)}


def _form(counts: Sequence[int], tau: float) -> Form:
    from vismt.multitask.class_loss import adjusted  # every configuration imports this file

    return partial(adjusted, counts=counts, tau=tau)
