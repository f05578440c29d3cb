"""Measures, their intervals and averages, and the kinds of conditions, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import t as student

from vismt.base.errors import UserError
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import condition_of
from vismt.robustness.corruptions import CorruptionSpec
from vismt.uncertainty.intervals import (
    CLEAN,
    NUMBER,
    SHARE,
    Condition,
    Estimate,
    Measure,
    average_of,
    averaged,
    estimate,
    interval_kind_text,
    interval_of,
    mean_interval,
    over_domains,
    over_seeds,
    wilson,
)

VALUES = {"a": 0.2, "b": 0.4, "c": 0.6, "d": 0.8}
# squares of the deviations from 0.5: .09 + .01 + .01 + .09 = .2
HALF = 3.182446 * math.sqrt(0.2 / 3) / 2  # t at three degrees of freedom


def test_a_measure_is_the_mean_of_its_values():
    measure = Measure("accuracy", VALUES)
    assert measure.score == pytest.approx(0.5)
    assert measure.interval() == pytest.approx((0.5 - HALF, 0.5 + HALF))
    assert (measure.scale, measure.better, measure.chance) == ("share", "higher", None)


def test_an_error_of_its_own_takes_the_place_of_that_of_a_mean():
    measure = Measure("ECE-15", VALUES, error=Estimate.within(0.5, (0.1, 0.7)))
    assert measure.interval() == pytest.approx((0.1, 0.7))
    assert measure.estimate().bias == pytest.approx((0.1, 0.1)) and measure.estimate().mean == 0.5


def test_an_interval_needs_two_values():
    with pytest.raises(UserError, match="interval over 1 values"):
        Measure("accuracy", {"a": 1.0}).interval()
    for values in ([], [0.5, math.nan]):
        with pytest.raises(UserError, match="need two or more, all finite"):
            mean_interval(values)
    with pytest.raises(UserError, match="none given"):
        average_of([])


def test_wilson_by_hand():
    # z = 1.959964, n = 4, p = 3/4: center (p + z^2/2n) / (1 + z^2/n), half z sqrt(p q / n + z^2 / 4 n^2) / (1 + z^2/n)
    z = 1.959963984540054
    grown = 1 + z**2 / 4
    center = (0.75 + z**2 / 8) / grown
    half = z * math.sqrt(0.75 * 0.25 / 4 + z**2 / 64) / grown
    assert wilson(3, 4) == pytest.approx((center - half, center + half))
    assert wilson(3, 4) == pytest.approx((0.30064, 0.95441), abs=1e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(0, 10)[1] == pytest.approx(z**2 / (10 + z**2))  # center + half at p = 0


def test_counts_of_one_training_have_wilsons_interval():
    right = Measure("accuracy", {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}, counts=True)
    assert right.interval() == wilson(3, 4)
    # the mean of trainings is no count: t at three degrees of freedom * 0.5 / 2 around 0.75, and no share exceeds 1
    mean = averaged([right, right])
    assert mean.interval() == (0.0, 1.0)
    number = averaged([replace(right, scale="number")] * 2)
    assert number.interval() == pytest.approx((0.75 - 3.182446 * 0.25, 0.75 + 3.182446 * 0.25), abs=1e-6)


def test_shares_stay_in_their_range_and_are_never_certain():
    few = Measure("accuracy", {"a": 0.9, "b": 0.8, "c": 1.0})
    assert few.interval()[1] == 1.0 and few.interval()[0] < 0.7
    assert replace(few, scale="number").interval()[1] > 1.0
    for value in (0.0, 1.0):
        all_equal = Measure("accuracy", {str(i): value for i in range(20)})
        assert all_equal.interval() == pytest.approx(wilson(20 * int(value), 20))
        again = averaged([all_equal, all_equal, all_equal]).interval()
        assert again == pytest.approx(all_equal.interval())
    assert Measure("accuracy", dict.fromkeys("abcd", 0.5)).interval() == (0.5, 0.5)


def test_the_average_over_trainings_is_example_by_example():
    first = Measure("accuracy", {"a": 1.0, "b": 0.0}, counts=True, chance=0.1)
    second = Measure("accuracy", {"b": 1.0, "a": 1.0}, counts=True, chance=0.1)
    mean = averaged([first, second])
    assert mean.values == {"a": 1.0, "b": 0.5} and mean.score == 0.75
    assert not mean.counts and mean.chance == 0.1 and averaged([first]) is first
    assert mean.interval() == (0.0, 1.0)  # two examples and two seeds, a degree of freedom each
    # Scores .5 and 1: .25 over seeds; deviation .35355 over examples: .25; t = 12.7062 of both.
    half = 12.7062 * math.sqrt(0.25**2 + 0.25**2)
    assert averaged([replace(first, scale="number"), second]).interval()[1] == pytest.approx(0.75 + half, abs=1e-3)


def test_folds_are_joined_and_their_scores_are_no_spread_of_trainings():
    first = Measure("accuracy", {"a": 1.0, "b": 0.0}, counts=True, chance=0.1)
    second = Measure("accuracy", {"c": 1.0, "d": 1.0}, counts=True, chance=0.1)
    joined = averaged([first, second])
    assert joined.values == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0} and joined.covers == "examples"
    assert joined.interval() == wilson(3, 4)
    twice = averaged([first, second, replace(first, values={"a": 0.0, "b": 0.0})])
    assert twice.values == {"a": 0.5, "b": 0.0, "c": 1.0, "d": 1.0} and not twice.counts


@pytest.mark.parametrize("mean, bias, end", [(0.03, 0.07, 0.0), (0.99, -0.07, 1.0)])
def test_both_ends_of_the_interval_of_a_share_are_shares(mean, bias, end):
    corrected = Estimate(mean, ((2e-4, 300.0),), bias=(bias, bias))
    assert interval_of(corrected, SHARE, 296) == (end, end)
    assert interval_of(corrected, NUMBER, 296) == corrected.bounds


def test_equal_seeds_have_the_interval_of_the_examples():
    first = Measure("NLL", {"a": 1.0, "b": 2.0, "c": 4.0}, "number", "lower")
    assert averaged([first, first, first]).interval() == pytest.approx(first.interval())


def biased(score, variance=0.01, bias=(0.06, 0.02), freedom=20.0):
    values = {"a": score - 0.1, "b": score + 0.1}
    error = Estimate(score, ((variance, freedom),), bias=bias)
    return Measure("ECE-15", values, "number", "lower", error=error, paired=False)


def test_the_spread_of_seeds_enters_a_biased_score_too():
    mean = averaged([biased(0.1), biased(0.3, 0.03, (0.04, 0.0))])
    found = mean.estimate()
    # Trainings share the examples: the mean variance is .02. The trainings' scores .1 and .3 have the variance .01 of their mean.
    assert found.mean == mean.score == pytest.approx(0.2) and found.covers == mean.covers == "examples+seeds"
    assert found.bias == pytest.approx((0.05, 0.01)) and found.sources == (
        (pytest.approx(0.02), 20),
        (pytest.approx(0.01), 1),
    )
    half = (2.085963 * 0.02 + 12.706205 * 0.01) / math.sqrt(0.03)
    assert mean.interval() == pytest.approx((0.2 - 0.05 - half, 0.2 - 0.01 + half), abs=1e-5)


def test_an_average_over_sets_has_the_mean_bias_and_a_part_of_the_variance():
    found = average_of([biased(0.1).estimate(), biased(0.3).estimate(), biased(0.2).estimate()])
    assert found.mean == pytest.approx(0.2) and found.bias == pytest.approx((0.06, 0.02))
    assert found.variance == pytest.approx(0.01 / 3) and found.sources[0][1] == pytest.approx(60)


def test_the_mean_of_intervals_that_begin_at_zero_begins_at_zero():
    """Three trainings whose calibration errors are not shown to differ from 0: their mean is not shown to either."""
    measures = [replace(biased(score, 0.0002, (score, 0.02)), scale="share") for score in (0.0716, 0.0918, 0.0934)]
    assert all(measure.interval()[0] == 0 for measure in measures) and averaged(measures).interval()[0] == 0


def test_folds_of_a_biased_score_are_independent():
    first, second = biased(0.1), biased(0.3)
    joined = averaged([first, replace(second, values={"c": 0.2, "d": 0.4})])
    assert joined.covers == "examples" and joined.score == pytest.approx(0.2)
    assert joined.estimate().variance == pytest.approx(0.005) and joined.estimate().bias == pytest.approx((0.06, 0.02))


def test_groups_of_examples_are_the_unit():
    """Four signs of one, two or three images: counts of images are not independent, so that Wilson's interval is too narrow."""
    right = {"a1": 1.0, "a2": 1.0, "b1": 0.0, "b2": 0.0, "b3": 0.0, "c1": 1.0, "d1": 0.0, "d2": 1.0}
    measure = Measure("accuracy", right, counts=True, groups={name: name[0] for name in right}, grouped_by="signs")
    # mean .5; sums of the deviations by sign 1, -1.5, .5, 0; 4 / 3 * (1 + 2.25 + .25) / 64
    assert measure.units == 4 and measure.estimate().variance == pytest.approx(4 / 3 * 3.5 / 64)
    # 8^2 / (4 + 9 + 1 + 4) groups of equal size; kurtosis 4 (1 + 5.0625 + .0625) / 3.5^2 = 2, which allows 8
    assert measure.estimate().sources[0][1] == pytest.approx(64 / 18 - 1)
    ratio = student.ppf(0.975, 64 / 18 - 1) ** 2 * measure.estimate().variance / 0.25  # q^2 V / (p (1 - p))
    half = math.sqrt(ratio / 4 + ratio**2 / 4) / (1 + ratio)
    assert measure.interval() == pytest.approx((0.5 - half, 0.5 + half))
    # Wilson's interval of independent examples is the same form with p (1 - p) / V = n
    alone = Estimate(0.75, ((0.75 * 0.25 / 8, math.inf),))
    assert interval_of(alone, SHARE, 8, "wilson") == pytest.approx(wilson(6, 8))
    assert measure.interval() != replace(measure, groups={}).interval() == wilson(4, 8)
    all_right = replace(measure, values=dict.fromkeys(right, 1.0))
    assert all_right.interval() == pytest.approx(wilson(4, 4))  # four signs, not eight images
    mean = averaged([measure, measure])
    assert mean.groups == measure.groups and mean.estimate().variance == pytest.approx(measure.estimate().variance)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_covers_the_truth_with_a_spread_of_seeds_too(spread):
    """Studies of four seeds on 50 examples: 95 % nominally; intervals over examples alone miss more often."""
    generator = torch.Generator().manual_seed(0)
    covered = alone = 0
    for _ in range(400):
        examples = torch.randn(50, generator=generator)
        seeds = spread * torch.randn(4, generator=generator)
        noise = torch.randn(4, 50, generator=generator) * 0.1
        rows = (examples + seeds[:, None] + noise).double()
        measures = [Measure("x", {str(i): float(v) for i, v in enumerate(row)}, "number") for row in rows]
        mean = averaged(measures)
        low, high = mean.interval()
        covered += low <= 0 <= high
        alone += abs(mean.score) <= mean_interval(list(mean.values.values()))[1]
    assert 0.9 < covered / 400 < 0.985 and (alone / 400 < 0.85) == bool(spread)


def test_the_half_width_over_examples_and_seeds_by_hand():
    known = Estimate(0.0, ((0.01, math.inf),))
    assert known.half == pytest.approx(1.959964 * 0.1)
    for groups in ([], [[0.4]], [[0.4, 0.4], [0.2, 0.2]]):
        assert known.with_seeds(*groups).half == pytest.approx(known.half)
    # three seeds .3, .4, .5: variance .01 / 3, a quarter of V: 3/4 of 1.96 and 1/4 of t(0.975, 2) = 4.302653
    seeds = [0.3, 0.4, 0.5]
    assert known.with_seeds(seeds).half == pytest.approx((3 * 1.959964 + 4.302653) / 4 * math.sqrt(0.04 / 3))
    # five parts in place of a known error: t(0.975, 4) = 2.776445
    parts = Estimate(0.0, ((0.01, 4.0),))
    assert parts.with_seeds(seeds).half == pytest.approx((3 * 2.776445 + 4.302653) / 4 * math.sqrt(0.04 / 3))
    # two seeds .3 and .5, variance .01: the mean of 1.96 and 12.7062, weighted by the variances
    assert known.with_seeds([0.3, 0.5]).half == pytest.approx((1.959964 + 12.706205) / 2 * math.sqrt(0.02))
    measure = Measure("accuracy", VALUES, "number")
    assert over_seeds(measure, [0.3]) is measure
    wide = over_seeds(measure, [0.3, 0.7]).interval()
    assert (
        wide[1] - 0.5 == pytest.approx(measure.estimate().with_seeds([0.3, 0.7]).half) == pytest.approx(0.5 - wide[0])
    )
    assert wide[1] - 0.5 > HALF


def test_an_auroc_has_an_interval_on_the_logit_scale():
    values = dict(zip("abcdef", [1.0, 1.0, 1.0, 0.9, 0.9, 0.9]))
    found = Measure("AUROC", values, "number", ranks=True)
    half = student.ppf(0.975, 5) * 0.05 / math.sqrt(5) / (0.95 * 0.05)
    assert found.interval() == pytest.approx(tuple(1 / (1 + math.exp(-math.log(19) - side * half)) for side in (-1, 1)))
    assert found.interval()[1] < 1 < replace(found, ranks=False).interval()[1] + 0.01
    # a measure with a bias, such as a calibration error, keeps its own scale
    biased = Estimate(0.1, ((0.01, 4.0),), bias=(0.02, 0.01))
    assert interval_of(biased, SHARE, 20, "logit") == interval_of(biased, SHARE, 20)


def test_groups_by_hand():
    # two parts, of means .2 and .6: sd .28284, over the root of 2: .2; t at one degree of freedom
    assert estimate([0.1, 0.7, 0.3, 0.5], groups="abab").half == pytest.approx(12.706205 * 0.2)
    # equal part means: the values differ only within the parts
    assert estimate([0.1, 0.3, 0.5, 0.3], groups="abab").half == pytest.approx(0.0)
    # parts of three and two values: shares .6 and .4, mean .44, 2 / 1 (.36 (.4 - .44)^2 + .16 (.5 - .44)^2)
    found = estimate([0.3, 0.4, 0.4, 0.6, 0.5], groups="ababa")
    assert found.variance == pytest.approx(2 * (0.36 * 0.04**2 + 0.16 * 0.06**2)) and found.mean == pytest.approx(0.44)
    # one group with most values: 15^2 / (12^2 + 1 + 1 + 1) equal groups, 0.53 degrees of freedom in place of three
    most = estimate([float(number % 2) for number in range(15)], groups="a" * 12 + "bcd")
    assert most.sources[0][1] == 1 and estimate([0.1, 0.7, 0.3], groups="abc").sources[0][1] == pytest.approx(2)
    # one of twelve groups with all of the spread: kurtosis (11^4 + 11) 12 / 132^2 = 10.09
    single = estimate([0.0] * 11 + [1.0], groups="abcdefghijkl")
    assert single.sources[0][1] == pytest.approx(24 / (12 * (11**4 + 11) / 132**2 - 1))
    assert estimate([0.0] * 11 + [1.0]).sources[0][1] == 11
    with pytest.raises(UserError, match="interval over 4 values in 1 groups: need two or more"):
        estimate([0.1] * 4, groups="aaaa")


def test_what_changes_nothing():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for groups in (None, [number % 5 for number in range(30)]):
        found, moved = estimate(values, groups=groups), estimate(values + 3, groups=groups)
        assert moved.half == pytest.approx(found.half) and moved.mean == pytest.approx(found.mean + 3)
        assert estimate(values - values, groups=groups).bounds == (0.0, 0.0)
        low, high = estimate(-values, groups=groups).bounds
        assert (-high, -low) == pytest.approx(found.bounds)


def test_averages_over_sets():
    first, second = estimate([0.5, 0.7, 0.9]), estimate([0.2, 0.3])
    found = average_of([first, second])
    variance = (first.variance + second.variance) / 4
    freedom = variance**2 / ((first.variance / 4) ** 2 / 2 + (second.variance / 4) ** 2)
    assert (found.mean, found.variance) == pytest.approx((0.475, variance))
    assert found.half == pytest.approx(student.ppf(0.975, freedom) * math.sqrt(variance))
    assert average_of([replace(first, covers="images"), replace(second, covers="sampler")]).covers == "sampler"
    assert average_of([replace(first, covers="images+seeds"), second]).covers == "images+seeds"
    # domains as a sample: .1, ..., .5, sd .15811, t at four degrees of freedom
    sample = over_domains([0.1, 0.2, 0.3, 0.4, 0.5])
    assert sample.half == pytest.approx(2.776445 * 0.158114 / math.sqrt(5)) and sample.covers == "domains"
    assert over_domains([0.1, 0.2, 0.3, 0.4]) is None


@pytest.mark.parametrize("shared", [True, False])
def test_the_interval_of_a_difference_covers_with_a_spread_of_seeds(shared):
    """Two equal models on the same 50 examples, the seeds those of both (paired) or four and three others."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    covered = alone = 0
    for _ in range(400):
        examples, together = draw(50), 0.3 * draw(4, 1)
        a = examples + 0.3 * draw(50) + 0.2 * draw(4, 1) + shared * together
        b = examples + 0.3 * draw(50) + 0.2 * draw(4, 1) + shared * together
        if not shared:
            b = b[:3]
        found = estimate(a.mean(0) - b.mean(0))
        groups = [a.mean(1) - b.mean(1)] if shared else [a.mean(1), b.mean(1)]
        covered += abs(found.mean) <= found.with_seeds(*(scores.tolist() for scores in groups)).half
        alone += abs(found.mean) <= found.half
    assert 0.92 < covered / 400 < 0.985 and alone / 400 < 0.85


def test_an_interval_names_what_it_covers():
    assert Measure("accuracy", VALUES).covers == "examples"
    seed = Measure("accuracy", VALUES, covers="sampler")
    assert averaged([seed]).covers == "sampler" and averaged([seed, seed]).covers == "sampler+seeds"
    assert over_seeds(averaged([seed, seed]), [0.1, 0.2]).covers == "sampler+seeds"
    assert interval_kind_text("images+seeds") == "95 % over new images of these classes and training seeds"


def test_student_over_seeds_by_hand():
    # t of 0.975: 12.7062 at one degree of freedom, 4.30265 at two
    assert mean_interval([2.0, 2.2]) == pytest.approx((2.1, 12.7062 * 0.1), abs=1e-4)
    assert mean_interval([0.5, 0.6, 0.7]) == pytest.approx((0.6, 4.30265 * 0.1 / math.sqrt(3)), abs=1e-5)


def test_kinds_of_conditions():
    assert Condition("clean", "clean", "clean", None) == CLEAN
    fog = condition_of(CorruptionSpec("fog", 3))
    assert (fog.kind, fog.family, fog.level) == ("corruption", "fog", 3.0)
    weak, strong = (condition_of(AttackSpec("pgd", epsilon)) for epsilon in (0.01, 0.02))
    assert weak.kind == strong.kind == "attack" and weak.family == strong.family != fog.family
    assert (weak.level, strong.level) == (0.01, 0.02) and weak.label != strong.label
    other = condition_of(AttackSpec("pgd", 0.01, norm="l2"))
    assert other.family != weak.family
