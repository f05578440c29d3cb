"""Logits z - tau log pi. pi has the classes' shares of the training images, and tau is chosen on validation examples.

The key `adjust_logits` of the job multitask switches this on, for whole images here and for maps by the score of their task.
vismt/multitask/class_loss.py has the method and its source. tau is the value of TAUS with the best mean accuracy over the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.multitask.class_loss import adjusted
from vismt.uncertainty.features import PROBABILITIES, VALIDATION, Feature, Form, View
from vismt.uncertainty.intervals import Condition

ADJUSTED = Condition("logit adjustment of validation", "variant", "logit adjustment")
TAUS = tuple(tau / 4 for tau in range(9))  # tried factors of the log prior, 0 to 2


@dataclass(frozen=True)
class Adjustment:
    """The tau that was chosen on n validation examples."""

    tau: float
    n: int


class AdjustLogits(Feature):
    """The accuracy of the adjusted logits."""

    key, needs = "adjust_logits", frozenset({PROBABILITIES, VALIDATION})
    decides = True
    _fitted: Adjustment | None = None
    _counts: Sequence[int] = ()

    def fitted(self, view: View) -> AdjustLogits:
        found = AdjustLogits(self.section)
        found._counts = view.class_counts

        def fit() -> Adjustment:
            tasks = [(of.logits, of.labels) for of in view.validation()]
            return Adjustment(best_tau(tasks, found._counts), sum(len(labels) for _, labels in tasks))

        found._fitted = view.fitted(self.key, Adjustment, fit, of_net=True)
        return found

    @property
    def forms(self) -> Mapping[Condition, Form]:
        assert self._fitted is not None  # `fitted` was called
        tau = self._fitted.tau
        return {ADJUSTED: lambda logits: adjusted(logits, self._counts, tau)}


def best_tau(tasks: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]) -> float:
    """Return the tau with the largest mean accuracy over the tasks. If several are equal, return the smallest.

    tasks: Logits (n, C) and labels (n,) of each task. counts: Training images of each class.
    """

    def score(tau: float) -> float:
        right = [(adjusted(logits, counts, tau).argmax(1) == labels).double().mean() for logits, labels in tasks]
        return float(torch.stack(right).mean())

    return max(TAUS, key=score)
