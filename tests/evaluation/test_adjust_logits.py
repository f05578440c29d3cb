"""The tau of adjusted logits, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vismt.evaluation.adjust_logits import ADJUSTED, AdjustLogits
from vismt.uncertainty.features import Validation, View


class Three(View):
    """Three validation images of two classes, of which class 0 has 9 of 10 training images."""

    class_counts = (9, 1)

    def __init__(self, labels: list[int]) -> None:
        self.labels = torch.tensor(labels)

    def score(self, *arguments, **options):
        raise AssertionError

    def fitted(self, name, kind, fit, *, of_net=False):
        return fit()

    def validation(self) -> list[Validation]:
        logits = torch.tensor([[1.0, 0], [1, 0], [3, 0]])
        return [Validation(logits, self.labels, torch.ones(3, dtype=torch.bool))]


@pytest.mark.parametrize(("labels", "tau"), [([1, 1, 0], 0.5), ([0, 0, 0], 0.0)])
def test_the_tau_is_the_smallest_of_the_best(labels: list[int], tau: float) -> None:
    # z_0 - z_1 = 1 for two images of class 1 is overcome by tau log 9 = 2.2 tau > 1, from tau = 1/2 on. z_0 - z_1 = 3 for an
    # image of class 0 survives until 2.2 tau > 3, tau = 1.5.
    form = AdjustLogits(True).fitted(Three(labels)).forms[ADJUSTED]
    assert form(torch.zeros(1, 2))[0].tolist() == pytest.approx([-tau * math.log(share) for share in (0.9, 0.1)])
