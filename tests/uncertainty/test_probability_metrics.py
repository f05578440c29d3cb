"""Probability metrics on numbers computed by hand, and the coverage of the ECE intervals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vismt.base.errors import UserError
from vismt.uncertainty.intervals import estimate
from vismt.uncertainty.probability_metrics import (
    binned_gaps,
    detection_auroc,
    detection_values,
    example_measures,
    example_values,
    expected_calibration_error,
    gap_values,
    scores,
)


def two(confidence: Tensor | list) -> Tensor:
    """Return probabilities (n, 2) with class 0 at `confidence`."""
    first = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)


def drawn(n: int, seed: int, over: float = 0.0) -> tuple[Tensor, Tensor]:
    """Draw binary predictions with confidences of .55 to .95 and an accuracy of the confidence minus `over`."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.55 + 0.1 * torch.randint(5, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < confidence - over
    return two(confidence), (~right).long()


def test_hand_made_numbers() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]])
    computed = scores(p, torch.tensor([0, 1, 2, 1]))
    assert computed.n == 4 and computed.accuracy == 0.5 and computed.correct.tolist() == [1, 0, 0, 1]
    assert computed.nlls.tolist() == pytest.approx([-math.log(v) for v in (0.7, 0.3, 0.25, 0.6)], rel=1e-6)
    # (.3^2 + .2^2 + .1^2), (.1^2 + .7^2 + .6^2), (.5^2 + .25^2 + .75^2), (.2^2 + .4^2 + .2^2): summed over classes
    assert computed.briers.tolist() == pytest.approx([0.14, 0.86, 0.875, 0.24], rel=1e-6)
    assert computed.brier == pytest.approx(0.52875, rel=1e-6) and computed.nll == pytest.approx(
        computed.nlls.mean().item()
    )
    # Bins of 1/15: .7 in [10/15, 11/15), both .6 in [9/15, 10/15), .5 in [7/15, 8/15). Gaps .3, |.5 - .6| (twice), .5.
    assert computed.ece == pytest.approx((0.3 + 2 * 0.1 + 0.5) / 4, abs=1e-6)


def test_calibrated_constant_and_uniform_predictions() -> None:
    p, y = drawn(400_000, 0)
    assert expected_calibration_error(p, y) < 0.004
    constant, labels = two([0.8] * 10), torch.tensor([0] * 6 + [1] * 4)
    assert expected_calibration_error(constant, labels) == pytest.approx(0.2)  # |.6 - .8|
    assert expected_calibration_error(constant, labels, bins=1) == pytest.approx(0.2)
    for k in (2, 5):
        uniform = scores(torch.full((10, k), 1 / k), torch.arange(10) % k)
        assert (
            uniform.brier == pytest.approx(1 - 1 / k)
            and uniform.nll == pytest.approx(math.log(k))
            and uniform.auroc == 0.5
        )


def test_bins_weigh_by_their_examples() -> None:
    p = two([0.95] * 9 + [0.55])  # nine right in one bin, one wrong in another
    assert expected_calibration_error(p, torch.tensor([0] * 9 + [1])) == pytest.approx(0.9 * 0.05 + 0.1 * 0.55)
    assert expected_calibration_error(two([0.62, 0.98]), torch.tensor([0, 0]), bins=2) == pytest.approx(0.2)
    assert expected_calibration_error(two([0.62, 0.98]), torch.tensor([1, 0]), bins=15) == pytest.approx(
        (0.62 + 0.02) / 2
    )


def answered(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidences of probabilities, and which answers are right."""
    confidences, chosen = p.max(1)
    return confidences, chosen == y


@pytest.mark.parametrize("k", [2, 3, 5])
def test_resampled_bins_are_those_of_the_value(k: int) -> None:
    torch.manual_seed(k)
    edges = torch.full((6, k), 1 / k, dtype=torch.float64)  # 1/3 and 1/5 lie on the edges of bins
    sure = F.one_hot(torch.arange(6) % k, k).double()  # 1 is the last edge
    p, y = torch.cat([torch.randn(200, k).double().softmax(1), edges, sure]), torch.randint(k, (212,))
    gaps = binned_gaps(*answered(p, y))
    assert (gaps.sum(0).abs().sum() / len(y)).item() == pytest.approx(expected_calibration_error(p, y), abs=1e-6)


def test_values_by_example_of_the_calibration_error() -> None:
    torch.manual_seed(0)
    p, y = torch.randn(200, 4).double().softmax(1), torch.randint(4, (200,))
    values, _ = gap_values(binned_gaps(*answered(p, y)))
    assert values.mean().item() == pytest.approx(expected_calibration_error(p, y), abs=1e-6)
    # Confidences 0.65 (right), 0.65 (wrong), 0.95 (right) in ten bins: sums 0.35 - 0.65 = -0.3 and 0.05.
    values, _ = gap_values(
        binned_gaps(torch.tensor([0.65, 0.65, 0.95]).double(), torch.tensor([True, False, True]), 10)
    )
    assert values.tolist() == pytest.approx([-0.35, 0.65, 0.05])  # the first bin with the sign of its sum


def test_measures_know_the_groups_of_dependent_examples() -> None:
    log_p, labels = two([0.6, 0.7, 0.9]).log(), torch.tensor([0, 1, 0])
    of = dict.fromkeys(names := ["a", "b", "c"], "user")
    for groups, kept in ((None, {}), (of, of)):
        found = example_measures(names, example_values(log_p, labels), log_p.argmax(1) == labels, groups)
        assert [measure.groups for measure in found] == [kept] * len(found)


def test_copies_of_an_example_tell_nothing_new() -> None:
    torch.manual_seed(0)
    p, y = torch.randn(50, 4).double().softmax(1), torch.randint(4, (50,))
    single = binned_gaps(*answered(p, y))
    _, wanted = gap_values(single)
    # Each example nine times: as the mean row of its copies, and as the group of its copies.
    copies = single.repeat_interleave(9, 0)
    for rows, groups in (
        (copies.unflatten(0, (50, 9)).mean(1), None),
        (copies, [number // 9 for number in range(450)]),
    ):
        _, found = gap_values(rows, groups)
        assert found.bounds == pytest.approx(wanted.bounds) and found.bias == pytest.approx(wanted.bias)
    # As 450 independent examples they would halve the interval and more.
    assert gap_values(copies)[1].half < 0.7 * wanted.half


def test_a_true_class_of_probability_zero_is_bad_and_finite() -> None:
    computed = scores(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert 40 < computed.nll < 60 and computed.brier == 1.0


def test_auroc_counts_pairs() -> None:
    torch.manual_seed(0)
    p = (torch.randn(80, 3) * 2).round().softmax(1)  # rounded, so that there are ties
    y = torch.randint(3, (80,))
    assert scores(p, y).auroc == pytest.approx(roc_auc_score(y, p.double().numpy(), multi_class="ovr"), abs=1e-6)
    absent = scores(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]]), torch.tensor([0, 1, 1]))
    assert absent.auroc == 1.0  # class 2 never occurs and does not count
    assert math.isnan(scores(two([0.7, 0.6]), torch.tensor([0, 0])).auroc)


@pytest.mark.parametrize("k", [2, 4])
def test_values_by_example_have_the_mean_and_the_spread_of_auroc(k: int) -> None:
    torch.manual_seed(0)
    y = torch.randint(k, (400,))
    logits = torch.randn(400, k).double() + 1.5 * torch.nn.functional.one_hot(y, k)
    logits = (logits * 4).round() / 4  # ties
    computed = scores(logits.softmax(1), y)
    assert float(computed.orders.mean()) == pytest.approx(computed.auroc, abs=1e-6)
    again = []
    for _ in range(300):
        drawn = torch.randint(400, (400,))
        again.append(scores(logits[drawn].softmax(1), y[drawn]).auroc)
    # The standard error of the mean of the values against that of the bootstrap
    assert float(computed.orders.std()) / 20 == pytest.approx(float(torch.tensor(again).std()), rel=0.15)


def test_detection_of_outliers_by_a_score() -> None:
    torch.manual_seed(0)
    inside, outside = torch.randint(0, 6, (50,)), torch.randint(2, 9, (70,))
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside)
    assert detection_auroc(inside, outside) == pytest.approx(pairs.mean().item(), abs=1e-6)
    same = torch.randn(30)
    assert detection_auroc(same, same) == 0.5 and detection_auroc(torch.zeros(3), torch.zeros(4)) == 0.5
    # A sigmoid would turn both into ties.
    assert detection_auroc(torch.tensor([100.0, 150.0]), torch.tensor([200.0, 1e9])) == 1.0
    assert detection_auroc(torch.tensor([-2e9, -300.0]), torch.tensor([-200.0, -100.0])) == 1.0
    assert detection_auroc(torch.ones(2), torch.zeros(2)) == 0.0


def test_the_error_of_one_bin_by_hand() -> None:
    far = 0.3 + 0.01 * torch.arange(10).double()[:, None]  # one bin far from 0: the ECE is a mean, without a bias
    found, groups = gap_values(far, groups := [number % 5 for number in range(10)])[1], groups
    assert found.bounds == pytest.approx(estimate(far, groups=groups).bounds) and found.bias == pytest.approx((0, 0))
    # Gaps .1 and -.1: the mean gap 0 has an error of .1, and |e| has the mean .0798. Nothing speaks against an ECE of 0.
    _, found = gap_values(torch.tensor([[0.1, 0.3], [-0.1, 0.3]], dtype=torch.float64))
    assert found.mean == pytest.approx(0.3) and found.bias == pytest.approx((0.1 * math.sqrt(2 / math.pi),) * 2)
    assert found.variance == pytest.approx(0.1**2 * (1 - 2 / math.pi))
    assert gap_values(far[:2], "aa")[1] is None  # one group has no spread


def test_the_mean_and_variance_of_an_observed_calibration_error_are_those_of_draws() -> None:
    """At its upper end, t ECE, an interval has the bias m(t) - t ECE and the variance V(t) of sum_b |t g_b + e_b|."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 4, generator=generator, dtype=torch.float64) * 0.2
    gaps = torch.tensor([0.05, -0.03, 0.01, 0.0]) + torch.randn(60, 4, generator=generator, dtype=torch.float64) @ mixed
    _, found = gap_values(gaps)
    mean, observed = gaps.mean(0), float(gaps.mean(0).abs().sum())
    t = (found.mean - found.bias[1] + found.half) / observed
    normal = torch.distributions.MultivariateNormal(t * mean, gaps.T.cov() / 60)
    torch.manual_seed(0)
    drawn = normal.sample((100_000,)).abs().sum(1)
    assert float(drawn.mean()) - t * observed == pytest.approx(found.bias[1], abs=5e-4)
    # The covariance of two absolute values is exact to second order of their correlation.
    assert float(drawn.var()) == pytest.approx(found.variance, rel=0.05)


@pytest.mark.parametrize("true", [[0.1, -0.06, 0.03, 0.0], [0.0, 0.0, 0.0, 0.01]])
def test_interval_of_ece_over_parts_covers_the_truth(true: list[float]) -> None:
    """Each part moves the gaps of the bins, as images do; an interval of independent rows does not know it."""
    generator = torch.Generator().manual_seed(0)
    covered = alone = 0
    for _ in range(100):
        moved = 0.03 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
        rows = 0.03 * torch.randn(100, 4, generator=generator, dtype=torch.float64)
        gaps = torch.tensor(true).double() + moved.repeat(20, 1) + rows
        low, high = gap_values(gaps, [number % 5 for number in range(100)])[1].bounds
        covered += low <= sum(map(abs, true)) <= high
        low, high = gap_values(gaps)[1].bounds
        alone += low <= sum(map(abs, true)) <= high
    assert covered / 100 >= 0.9 and alone / 100 < 0.8, (covered, alone)


@pytest.mark.parametrize("over", [0.0, 0.05, 0.15])
def test_interval_of_ece_covers_the_truth(over: float) -> None:
    covered, mean_ece = 0, 0.0
    for seed in range(40):
        p, y = drawn(300, seed, over)
        values, found = gap_values(binned_gaps(*answered(p, y)))
        covered, mean_ece = covered + (found.bounds[0] <= over <= found.bounds[1]), mean_ece + float(values.mean()) / 40
    assert covered >= 0.85 * 40
    assert over or mean_ece > 0.03  # the ECE of a calibrated model is far above the 0 that the intervals contain


def test_the_interval_narrows_with_the_number_of_examples() -> None:
    few, many = (gap_values(binned_gaps(*answered(*drawn(count, 0, 0.1))))[1].half for count in (400, 6400))
    assert 3 < few / many < 5.5  # sqrt(16)


@pytest.mark.parametrize(
    "p,y,message",
    [
        (torch.randn(3, 2), torch.zeros(3).long(), "are they logits"),
        (torch.full((3, 2), math.nan), torch.zeros(3).long(), "NaN"),
        (torch.full((3, 2), 0.5), torch.zeros(4).long(), "needed \\(n, k\\)"),
        (torch.full((3,), 0.5), torch.zeros(3).long(), "needed \\(n, k\\)"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 2]), "in \\[0, 2\\], needed whole numbers in \\[0, 1\\]"),
        (torch.full((3, 2), 0.5), torch.zeros(3), "torch.float32"),
    ],
)
def test_inputs_that_are_no_predictions(p: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores(p, y)


def test_settings_that_are_none() -> None:
    p, y = drawn(10, 0)
    with pytest.raises(UserError, match="0 bins"):
        scores(p, y, bins=0)
    with pytest.raises(UserError, match="0 inside and 2 outside"):
        detection_auroc(torch.zeros(0), torch.zeros(2))


def test_detection_values_have_the_auroc_as_mean_and_delongs_variance() -> None:
    # inliers 1, 2, 3 and outliers 2, 4: pairs won 1, 1/2, 0 against 2 and 3 of 3 against 4: AUROC 4.5 / 6
    inside, outside = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0])
    values = detection_values(inside, outside)
    assert float(values.mean()) == pytest.approx(0.75) == pytest.approx(detection_auroc(inside, outside))
    # of the inliers: 1, 3/4, 1/2 ranked right; deviations times 5/3: 0.4167, 0, -0.4167; of the outliers 1/2, 1, times 5/2
    assert (values - 0.75).tolist() == pytest.approx([5 / 12, 0.0, -5 / 12, -0.625, 0.625])
