"""Measures, their intervals and averages, and the kinds of conditions, by hand."""

import math

import pytest
import torch
from scipy.stats import t as student

from vismt.base.errors import UserError
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import condition_of
from vismt.robustness.corruptions import CorruptionSpec
from vismt.uncertainty.intervals import (
    CLEAN,
    Condition,
    Measure,
    averaged,
    interval_kind_text,
    mean_interval,
    over_seeds,
    seeds_interval,
    wilson,
    with_seeds,
)

VALUES = {"a": 0.2, "b": 0.4, "c": 0.6, "d": 0.8}
# squares of the deviations from 0.5: .09 + .01 + .01 + .09 = .2
HALF = 1.96 * math.sqrt(0.2 / 3) / 2


def test_a_measure_is_the_mean_of_its_values():
    measure = Measure("accuracy", VALUES)
    assert measure.score == pytest.approx(0.5)
    assert measure.interval() == pytest.approx((0.5 - HALF, 0.5 + HALF)) == measure.training_interval()
    assert (measure.scale, measure.better, measure.chance) == ("share", "higher", None)


def test_bounds_take_the_place_of_the_interval():
    measure = Measure("ECE-15", VALUES, bounds=(0.1, 0.7))
    assert measure.interval() == (0.1, 0.7) == measure.training_interval()


def test_an_interval_needs_two_values():
    with pytest.raises(UserError, match="interval over 1 values"):
        Measure("accuracy", {"a": 1.0}).interval()


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
    assert right.training_interval() == wilson(3, 4)
    # 1.96 * 0.5 / 2 around 0.75
    assert right.interval() == pytest.approx((0.26, 1.24))


def test_the_average_over_trainings_is_example_by_example():
    first = Measure("accuracy", {"a": 1.0, "b": 0.0}, counts=True, chance=0.1)
    second = Measure("accuracy", {"b": 1.0, "a": 1.0}, counts=True, chance=0.1)
    mean = averaged([first, second])
    assert mean.values == {"a": 1.0, "b": 0.5} and mean.score == 0.75
    assert not mean.counts and mean.chance == 0.1 and averaged([first]) is first
    # Scores .5 and 1: .25 over seeds; deviation .35355 over examples: .25; (2 - 1) (1 + 1)^2 degrees of freedom, t = 2.77645.
    half = 2.77645 * math.sqrt(0.25**2 + 0.25**2)
    assert mean.interval() == pytest.approx((0.75 - half, 0.75 + half), abs=1e-5) == mean.training_interval()


def test_equal_seeds_have_the_interval_of_the_examples():
    first = Measure("NLL", {"a": 1.0, "b": 2.0, "c": 4.0}, "number", "lower")
    assert averaged([first, first, first]).interval() == pytest.approx(first.interval())


def test_the_spread_of_seeds_enters_bounds_too():
    first = Measure("ECE-15", {"a": 0.1, "b": 0.1}, bounds=(0.0, 0.2))
    second = Measure("ECE-15", {"a": 0.3, "b": 0.3}, bounds=(0.1, 0.6))
    mean = averaged([first, second])
    assert mean.score == pytest.approx(0.2)
    low, high = mean.bounds
    assert high - mean.score == pytest.approx(mean.score - low) and high - mean.score > (0.1 + 0.25) / 2


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
    assert with_seeds(0.196) == with_seeds(0.196, [0.4]) == with_seeds(0.196, [0.4, 0.4], [0.2, 0.2]) == 0.196
    # se .1 over examples and .1 over the seeds .3 and .5: (1 + 1)^2 = 4 degrees of freedom, t = 2.77645
    assert with_seeds(0.196, [0.3, 0.5]) == pytest.approx(2.77645 * math.sqrt(0.02), abs=1e-5)
    # a second group of three, .1, .2, .3, standard error .1 / sqrt(3): V = .01 + .01 + .00333
    half = student.ppf(0.975, (0.02 + 0.01 / 3) ** 2 / (1e-4 + (0.01 / 3) ** 2 / 2)) * math.sqrt(0.02 + 0.01 / 3)
    assert with_seeds(0.196, [0.3, 0.5], [0.1, 0.2, 0.3]) == pytest.approx(half)
    measure = Measure("accuracy", VALUES)
    assert over_seeds(measure, [0.3]) is measure
    wide = over_seeds(measure, [0.3, 0.7]).interval()
    assert wide[1] - 0.5 == pytest.approx(with_seeds(HALF, [0.3, 0.7])) == pytest.approx(0.5 - wide[0])


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
        mean, half = mean_interval(a.mean(0) - b.mean(0))
        groups = [a.mean(1) - b.mean(1)] if shared else [a.mean(1), b.mean(1)]
        covered += abs(mean) <= with_seeds(half, *(scores.tolist() for scores in groups))
        alone += abs(mean) <= half
    assert 0.92 < covered / 400 < 0.985 and alone / 400 < 0.85


def test_an_interval_names_what_it_covers():
    assert Measure("accuracy", VALUES).covers == "examples"
    seed = Measure("accuracy", VALUES, covers="sampler")
    assert averaged([seed]).covers == "sampler" and averaged([seed, seed]).covers == "sampler+seeds"
    assert over_seeds(averaged([seed, seed]), [0.1, 0.2]).covers == "sampler+seeds"
    assert interval_kind_text("images+seeds") == "95 % over new images of these classes and training seeds"
    assert "earlier version" in interval_kind_text("")


def test_student_over_seeds_by_hand():
    # t of 0.975: 12.7062 at one degree of freedom, 4.30265 at two
    assert seeds_interval([2.0, 2.2]) == pytest.approx((2.1, 12.7062 * 0.1), abs=1e-4)
    assert seeds_interval([0.5, 0.6, 0.7]) == pytest.approx((0.6, 4.30265 * 0.1 / math.sqrt(3)), abs=1e-5)


def test_kinds_of_conditions():
    assert Condition("clean", "clean", "clean", None) == CLEAN
    fog = condition_of(CorruptionSpec("fog", 3))
    assert (fog.kind, fog.family, fog.level) == ("corruption", "fog", 3.0)
    weak, strong = (condition_of(AttackSpec("pgd", epsilon)) for epsilon in (0.01, 0.02))
    assert weak.kind == strong.kind == "attack" and weak.family == strong.family != fog.family
    assert (weak.level, strong.level) == (0.01, 0.02) and weak.label != strong.label
    other = condition_of(AttackSpec("pgd", 0.01, norm="l2"))
    assert other.family != weak.family
