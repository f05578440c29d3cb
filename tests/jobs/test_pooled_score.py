"""Scores of pooled pixels and their jackknife: numbers by hand, against leaving images out for real."""

from __future__ import annotations

import math

import pytest
import torch

from vismt.base.errors import UserError
from vismt.jobs.multitask.pooled_score import PooledScore
from vismt.multitask.tasks import make_task
from vismt.uncertainty.intervals import estimate, mean_interval

DEPTH = make_task("depth")


def depth(errors: list[list[float]]) -> PooledScore:
    """Images of one row; the truth is 2 m everywhere."""
    pool = PooledScore(DEPTH)
    for number, row in enumerate(errors):
        truth = torch.full((1, 1, len(row)), 2.0)
        pool.add({"id": f"image {number}", **pool.columns(truth[:, None] + torch.tensor(row), truth)})
    return pool


def test_the_score_is_pooled_and_psi_average_to_it() -> None:
    pool = depth([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    scored = pool.result()
    # sqrt((2 + 0 + .5) / 6) = .6455; the mean of the images' own 1, 0, .5 is another number
    assert scored.value == pytest.approx(math.sqrt(2.5 / 6))
    assert [pool.alone(name) for name in scored.images] == pytest.approx([1.0, 0.0, 0.5])
    # without 0: sqrt(.5 / 4), without 1: sqrt(2.5 / 4), without 2: sqrt(2 / 4)
    without = [math.sqrt(0.125), math.sqrt(0.625), math.sqrt(0.5)]
    mean = sum(without) / 3
    assert list(scored.images.values()) == pytest.approx([scored.value + 2 * (mean - other) for other in without])
    value, half = mean_interval(list(scored.images.values()))
    assert value == pytest.approx(scored.value)
    # the jackknife's variance, (n - 1) / n sum (theta_i - mean)^2
    assert half == pytest.approx(4.302653 * math.sqrt(2 / 3 * sum((other - mean) ** 2 for other in without)))


@pytest.mark.slow
def test_the_interval_holds_what_new_images_give() -> None:
    """The spread of the pooled score over many sets of images is the jackknife's standard error, within its own noise."""
    generator = torch.Generator().manual_seed(0)
    scores, errors = [], []
    for _ in range(200):
        size = torch.rand(12, 1, generator=generator) + 0.2
        rows = (size * torch.randn(12, 8, generator=generator)).clamp(-1.5, 1.5)
        scored = depth(rows.tolist()).result()
        scores.append(scored.value)
        errors.append(math.sqrt(estimate(list(scored.images.values())).variance))
    spread = float(torch.tensor(scores).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("name", ["semseg", "normals", "edge", "saliency"])
def test_leaving_an_image_out_is_scoring_the_others(name: str) -> None:
    """For every metric: psi give back the score of the set without each image."""
    task = make_task({"name": "semseg", "classes": 3} if name == "semseg" else name)
    generator = torch.Generator().manual_seed(3)
    samples = []
    for _ in range(4):
        target = torch.randint(0, 3 if name == "semseg" else 2, (1, 12, 12), generator=generator)
        if name == "normals":
            target = torch.nn.functional.normalize(torch.randn(1, 3, 12, 12, generator=generator), dim=1)
        samples.append((torch.randn(1, task.channels, 12, 12, generator=generator), target))
    pools = [PooledScore(task) for _ in range(5)]
    for number, (prediction, target) in enumerate(samples):
        for left_out, pool in enumerate(pools):
            if number != left_out:
                pool.add({"id": str(number), **pool.columns(prediction, target)})
    whole, without = pools[4].result(), [pool.result().value for pool in pools[:4]]
    mean = sum(without) / 4
    assert list(whole.images.values()) == pytest.approx(
        [whole.value + 3 * (mean - other) for other in without], abs=1e-9
    )


def test_images_without_a_value_are_left_out_and_too_few_are_an_error() -> None:
    pool = depth([[1.0], [0.5]])
    pool.add({"id": "blank", **pool.columns(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))})
    assert list(pool.result().images) == ["image 0", "image 1"]
    with pytest.raises(UserError, match=r"1 image\(s\) with a value for depth"):
        depth([[1.0]]).result()
    edge = PooledScore(make_task("edge"))
    truth = torch.zeros(1, 6, 6, dtype=torch.int64)
    line = truth.index_fill(2, torch.tensor([3]), 1)
    edge.add({"id": "none", **edge.columns(torch.zeros(1, 1, 6, 6), truth)})
    edge.add({"id": "some", **edge.columns(torch.zeros(1, 1, 6, 6), line)})
    with pytest.raises(UserError, match="edge rests on image 'some' alone"):
        edge.result()
    nan = PooledScore(make_task({"name": "semseg", "classes": 3, "absent": "nan"}))
    for number in range(2):
        prediction = torch.eye(3)[torch.zeros(1, 4, 4, dtype=torch.int64)].movedim(-1, 1)
        nan.add({"id": str(number), **nan.columns(prediction, torch.zeros(1, 4, 4).long())})
    with pytest.raises(UserError, match="the score of semseg is nan"):
        nan.result()
