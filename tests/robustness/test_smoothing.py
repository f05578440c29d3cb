"""Randomised smoothing: radii of a linear model, whose true radius is known, the level of the bound, and what f contains."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from vismt.base.errors import UserError
from vismt.evaluation.certify import Certify
from vismt.robustness.evaluate import evaluate_examples
from vismt.robustness.smoothing import ABSTAINED, FIRST, Smoothing
from vismt.uncertainty.features import Rows

SHAPE = (3, 4, 4)
UNIT = torch.ones(SHAPE).flatten() / math.sqrt(48)


class Halfspace(nn.Module):
    """Class 1 where unit . x > 0: the distance of x to class 0 is unit . x."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        margin = images.flatten(1) @ UNIT / self.scale
        return torch.stack([-margin, margin], 1)


def at(margin: float, count: int) -> torch.Tensor:
    """Return `count` equal images at a distance from the boundary."""
    return (margin * UNIT).view(1, *SHAPE).expand(count, -1, -1, -1)


def keys(count: int) -> list[tuple[int, int]]:
    return [(7, position) for position in range(count)]


def test_the_radius_of_votes_by_hand():
    smoothing = Smoothing(sigma=0.5, samples=100)
    # all 100 votes: p = alpha^(1/100); 0 and half of the votes: nothing
    assert smoothing.radius(100) == pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 100)))
    assert smoothing.radius(0) == smoothing.radius(50) == 0.0
    assert 0 < smoothing.radius(80) < smoothing.radius(90) < smoothing.largest == smoothing.radius(100)


def test_the_exact_radius_bounds_the_certified_one():
    smoothing = Smoothing(sigma=0.25, samples=1000)
    answers, radii = smoothing.certify(Halfspace(), at(0.25, 40), keys(40))
    # P(f(x + e) = 1) = Phi(margin / sigma) = Phi(1); the bound over 1,000 draws gives .213 in the mean
    assert bool((answers == 1).all()) and float(radii.max()) < 0.25
    assert float(radii.mean()) == pytest.approx(0.213, abs=0.006)
    answers, radii = smoothing.certify(Halfspace(), at(-0.5, 10), keys(10))
    assert bool((answers == 0).all()) and 0.4 < float(radii.mean()) < 0.5
    far = smoothing.certify(Halfspace(), at(10.0, 2), keys(2))[1]
    assert far.tolist() == pytest.approx([smoothing.largest] * 2)  # 1,000 draws prove no more


def test_the_scale_of_pixels_is_the_scale_of_radii():
    one = Smoothing(sigma=0.25, samples=200).certify(Halfspace(), at(0.3, 5), keys(5))[1]
    two = Smoothing(sigma=0.5, samples=200).certify(Halfspace(2.0), at(0.6, 5), keys(5))[1]
    assert two.tolist() == pytest.approx((2 * one).tolist())


def test_on_the_boundary_it_abstains():
    answers, radii = Smoothing(samples=200).certify(Halfspace(), at(0.0, 60), keys(60))
    assert int((answers == ABSTAINED).sum()) >= 59 and float(radii[answers == ABSTAINED].max()) == 0


def test_draws_follow_the_key_alone():
    smoothing, images = Smoothing(samples=150), torch.rand(4, *SHAPE) - 0.5
    answers, radii = smoothing.certify(Halfspace(), images, keys(4))
    order = [2, 0, 3, 1]
    shuffled = smoothing.certify(Halfspace(), images[order], [keys(4)[i] for i in order])
    assert torch.equal(shuffled[0], answers[order]) and torch.equal(shuffled[1], radii[order])
    other = Smoothing(samples=150, seed=1).certify(Halfspace(), at(0.2, 4), keys(4))[1]
    assert not torch.equal(other, smoothing.certify(Halfspace(), at(0.2, 4), keys(4))[1])


def test_hopeless_images_cost_the_first_draws_alone():
    seen = []

    def spread(images):
        seen.append(len(images))
        return torch.eye(5)[torch.arange(len(images)) % 5]

    answers, radii = Smoothing(samples=1000).certify(spread, torch.rand(1, *SHAPE), keys(1))
    assert (answers.item(), radii.item(), sum(seen)) == (ABSTAINED, 0.0, FIRST)


def test_choice_and_bound_have_draws_of_their_own():
    # of the first draws all are class 1, of the others none: a bound that counted the first would certify class 1
    calls = iter([torch.tensor([0.0, 1.0]).expand(FIRST, 2)] + [torch.tensor([1.0, 0.0]).expand(100, 2)] * 2)
    answers, _ = Smoothing(samples=200).certify(lambda images: next(calls), torch.rand(1, *SHAPE), keys(1))
    assert answers.item() == ABSTAINED


@pytest.mark.parametrize(("repeats", "samples"), [(300, 100), pytest.param(20000, 1000, marks=pytest.mark.slow)])
def test_the_bound_covers(repeats, samples):
    """Votes of the linear model are binomial: the radius exceeds the distance in at most a share alpha of the images."""
    smoothing = Smoothing(sigma=0.25, samples=samples, alpha=0.05 if repeats < 1000 else 0.001)
    generator = torch.Generator().manual_seed(0)
    for margin in (0.05, 0.25, 0.4):
        p = torch.full((repeats,), float(norm.cdf(margin / smoothing.sigma)))
        votes = torch.binomial(torch.full((repeats,), float(samples)), p, generator=generator)
        counts = votes.long().bincount().tolist()
        wrong = sum(count for k, count in enumerate(counts) if count and smoothing.radius(k) > margin)
        allowed = repeats * smoothing.alpha
        assert wrong <= allowed + 3 * math.sqrt(allowed)


def test_records_and_accuracies():
    smoothing = Smoothing(sigma=0.25, samples=200)
    feature = Certify(smoothing)
    images = torch.cat([at(margin, 1) for margin in (0.6, 0.3, 0.02, 0.6)]) + 0.0
    labels = torch.tensor([1, 1, 1, 0])
    rows = evaluate_examples(Halfspace(), [(images, labels)], [], num_classes=2, features=[feature])
    assert [row["clean"] for row in rows] == [1, 1, 1, 1]
    assert [row["clean smoothed 0.25"] for row in rows][:2] == [1, 1]
    radii = [row["clean smoothed 0.25 radius"] for row in rows]
    assert radii[0] > 0.25 and radii[1] < 0.3 and smoothing.largest < 0.75
    *certified, abstentions = feature.quantities()
    found = {of.condition.level: feature.values(of, Rows(rows), {}).tolist() for of in certified}
    assert abstentions.metric == "abstentions" and feature.values(abstentions, Rows(rows), {})[:2].tolist() == [0, 0]
    assert list(found) == [0.0, 0.25]  # the others are out of reach of 200 draws
    assert found[0.0][0] == 1 and found[0.0][3] == 0 and found[0.25][0] == 1 and sum(found[0.25][2:]) == 0
    assert all(a >= b for a, b in zip(found[0.0], found[0.25]))


def test_the_size_of_batches_changes_no_certificate():
    images, labels, names = torch.rand(4, *SHAPE) - 0.45, torch.ones(4, dtype=torch.long), ["a", "b", "c", "d"]

    def rows(size: int) -> list[dict]:
        parts = [slice(start, start + size) for start in range(0, 4, size)]
        batches = [(images[part], labels[part], names[part]) for part in parts]
        return evaluate_examples(Halfspace(), batches, [], num_classes=2, features=[Certify(Smoothing(samples=100))])

    assert rows(4) == rows(2) and len({row["clean smoothed 0.25 radius"] for row in rows(4)}) > 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sigma": 0.0}, "evaluate.certify.sigma"),
        ({"samples": 5}, "samples 5 cannot certify anything at alpha 0.001; give 10 or more"),
        ({"alpha": 0.0}, "evaluate.certify.alpha"),
        ({"samples": 0}, "evaluate.certify.samples"),
    ],
)
def test_one_line_errors(options, text):
    with pytest.raises(UserError, match=text) as error:
        Smoothing(**options)
    assert "\n" not in str(error.value)
