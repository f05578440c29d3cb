"""Conformal thresholds and selective prediction against numbers by hand, and coverage over many draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.division import validation_parts
from vismt.engine.study import TuneConfig
from vismt.evaluation.sections import divides
from vismt.jobs.multitask.config import MultitaskEvaluateConfig
from vismt.uncertainty.conformal import conformal_quantile, least_examples, set_sizes
from vismt.uncertainty.intervals import wilson
from vismt.uncertainty.selective import (
    accepting_threshold,
    risk_coverage_interval,
    risk_coverage_values,
    selective_risk,
)


def test_the_threshold_is_the_score_of_the_rank_that_counts_the_new_example() -> None:
    # n = 19, 90 %: rank ceil(20 * 0.9) = 18 of 19; the plain quantile would take ceil(19 * 0.9) = 18 as well
    scores = torch.arange(1.0, 20.0)
    assert conformal_quantile(scores.flip(0), 0.9) == 18.0
    # n = 9: rank ceil(10 * 0.9) = 9, the largest score, also where 10 * 0.9 is not exactly 9
    assert conformal_quantile(torch.arange(1.0, 10.0), 0.9) == 9.0
    # n = 10: rank ceil(11 * 0.9) = ceil(9.9) = 10; without the + 1 it would be 9
    assert conformal_quantile(torch.arange(1.0, 11.0), 0.9) == 10.0
    assert [least_examples(c) for c in (0.5, 0.9, 0.95)] == [1, 9, 19]


def test_the_finite_sample_rank_covers_and_the_plain_quantile_does_not() -> None:
    # With n = 12 uniform scores the expected coverage of the r-th smallest is r / (n + 1): 12/13 = 0.923 for r = ceil(13 * 0.9)
    # = 12, and 11/13 = 0.846 for the plain quantile's r = ceil(12 * 0.9) = 11.
    draws = torch.rand(4000, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.tensor([conformal_quantile(row, 0.9) for row in draws]).mean()
    plain = draws.kthvalue(math.ceil(12 * 0.9), dim=1).values.mean()
    assert ours == pytest.approx(12 / 13, abs=0.005) and ours >= 0.9
    assert plain == pytest.approx(11 / 13, abs=0.005) and plain < 0.9


def test_sets_hold_the_classes_whose_probability_is_large_enough() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.2, 0.2, 0.6]])
    # quantile -log 0.25: classes with p >= 0.25
    assert set_sizes(p.log(), -math.log(0.25) + 1e-6).tolist() == [1, 3, 1]
    # a high threshold on p leaves sets empty
    assert set_sizes(p.log(), -math.log(0.65)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("scores", "coverage", "text"),
    [
        (torch.ones(8), 0.9, "8 calibration examples"),
        (torch.ones(20), 1.0, "coverage 1.0"),
        (torch.tensor([float("nan")] * 20), 0.9, "without NaN"),
    ],
)
def test_thresholds_that_do_not_exist_are_errors(scores, coverage, text) -> None:
    with pytest.raises(UserError, match=text):
        conformal_quantile(scores, coverage)


def test_selective_risk_is_the_error_among_the_accepted() -> None:
    confidences = torch.tensor([0.9, 0.8, 0.6, 0.5], dtype=torch.float64)
    wrong = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    # tau 0.6 accepts three, of which one is wrong
    values = selective_risk(confidences, wrong, 0.6)
    assert values is not None and float(values.mean()) == pytest.approx(1 / 3)
    # deviations a_i (e_i - 1/3) / (3/4): -4/9, 8/9, -4/9, 0
    assert (values - 1 / 3).tolist() == pytest.approx([-4 / 9, 8 / 9, -4 / 9, 0.0])
    assert selective_risk(confidences, wrong, 0.95) is None
    assert [accepting_threshold(confidences, share) for share in (0.25, 0.5, 0.51, 1.0)] == [0.9, 0.8, 0.6, 0.5]


def test_the_area_under_the_risk_coverage_curve_is_the_mean_of_its_values() -> None:
    confidences = torch.tensor([0.5, 0.9, 0.8, 0.6], dtype=torch.float64)
    wrong = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    # in order of confidence the answers are right, wrong, right, wrong: risks 0, 1/2, 1/3, 1/2, mean 1/3
    assert float(risk_coverage_values(confidences, wrong).mean()) == pytest.approx(1 / 3)
    low, high = risk_coverage_interval(confidences, wrong)
    assert low < 1 / 3 < high
    # all wrong: no draw differs, but the next answer can be right
    assert risk_coverage_interval(confidences, torch.ones(4)) == wilson(4, 4) != (1.0, 1.0)
    # draws without the right answer: their area is 1, and not the next number
    one_right = (torch.arange(26) != 13).double()
    assert risk_coverage_interval(torch.linspace(0.1, 0.9, 26).double(), one_right)[1] == 1
    # without an order the area is the error, whatever the order in memory
    for order in ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]):
        assert float(risk_coverage_values(torch.ones(4), torch.tensor(order)).mean()) == pytest.approx(0.25)
    with pytest.raises(UserError, match="AURC"):
        risk_coverage_values(torch.ones(0), torch.ones(0))


def test_ties_enter_the_area_in_expectation_over_their_orders() -> None:
    """Against the mean over all orders of rows of one confidence."""
    confidences = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.5, 0.7], dtype=torch.float64)
    wrong = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    steps = torch.arange(1, 7, dtype=torch.float64)
    orders = [list(order) for order in itertools.permutations(range(6))]
    orders = [order for order in orders if bool((confidences[order].diff() <= 0).all())]
    assert len(orders) == math.factorial(2) * math.factorial(3)
    areas = torch.stack([(wrong[order].cumsum(0) / steps).mean() for order in orders])
    assert areas.max() - areas.min() > 0.1
    assert float(risk_coverage_values(confidences, wrong).mean()) == pytest.approx(float(areas.mean()))


def test_the_interval_of_the_area_is_that_of_the_rows_in_any_order() -> None:
    # 60 rows of one confidence: the area is the error whatever the order, and so it is of every draw: a binomial share
    ties, wrong = torch.full((60,), 0.8), (torch.arange(60) < 12).double()
    low, high = risk_coverage_interval(ties, wrong)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 60)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.03)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for confidences in (ties, torch.tensor([0.9, 0.6, 0.6, 0.3]).repeat(15)):
        here, there = (
            risk_coverage_interval(confidences[i], wrong[i], resamples=100) for i in (torch.arange(60), order)
        )
        assert here == there


def test_validation_examples_that_choose_a_rate_give_no_thresholds() -> None:
    """Five rates of equal quality: the best on 50 examples does not reach 90 % by the threshold of the same 50, halves do."""
    scores = torch.rand(4000, 5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = (scores < 0.5).double()  # the score of a right answer is low

    def coverage(chooses: Tensor, gives: Tensor) -> float:
        best = right[:, :, chooses].mean(2).argmax(1)
        kept = scores[torch.arange(len(scores)), best][:, gives]
        return float(torch.tensor([conformal_quantile(row, 0.9) for row in kept]).mean())  # uniform scores

    labels = torch.arange(50) % 3
    everything = validation_parts(labels, False)
    assert coverage(*everything) < 0.89
    # the ceil(26 * 0.9) = 24th of 25: 24 / 26
    assert coverage(*validation_parts(labels, True)) == pytest.approx(24 / 26, abs=0.003)


def test_the_halves_of_validation_have_every_class_in_both() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 1, 0, 2, 5])
    chooses, gives = validation_parts(labels, True)
    # classes of 3, 2, 4 and 1: the running half gives 1, 1, 2 and 1 to the choice; neighbours stay together
    assert chooses.nonzero().flatten().tolist() == [0, 1, 3, 4, 9] and bool((chooses ^ gives).all())
    assert all(bool(mask.all()) for mask in validation_parts(labels, False))
    evaluate = MultitaskEvaluateConfig(risk=True)
    asked = [(MultitaskEvaluateConfig(), [1.0, 2.0]), (evaluate, None), (evaluate, [1.0]), (evaluate, [1.0, 2.0])]
    assert [divides(of, rates and TuneConfig(rates)) for of, rates in asked] == [False, False, False, True]


def test_the_halves_of_validation_share_no_group() -> None:
    labels = torch.tensor([0] * 8 + [1] * 6 + [2] * 5)
    # pairs that lie apart, a group over the cut, and a person with images of two classes
    groups = list("abcdabcd") + list("efffgg") + list("hijka")
    chooses, gives = validation_parts(labels, True, groups)
    sides = [{groups[i] for i in mask.nonzero().flatten().tolist()} for mask in (chooses, gives)]
    assert not sides[0] & sides[1] and bool((chooses ^ gives).all())
    assert [sorted(side) for side in sides] == [list("abefh"), list("cdgijk")]
    alone = validation_parts(labels, True, [str(i) for i in range(19)])
    assert torch.equal(alone[0], validation_parts(labels, True)[0])
