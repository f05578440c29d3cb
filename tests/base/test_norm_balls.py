"""The balls of attacks against optimisers that know nothing of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from vismt.base.norm_balls import NORMS, project, random_start, size, size_of_all, steepest, within_budget


def drawn(seed, count=1, side=2):
    """Images in [0, 1], some of their pixels at the border, and changes."""
    generator = torch.Generator().manual_seed(seed)
    images = (1.4 * torch.rand(count, 3, side, side, generator=generator) - 0.2).clamp(0, 1)
    return images.double(), torch.randn(count, 3, side, side, generator=generator).double()


def nearest(clean, moved, epsilon):
    """Return the squared distance of `moved` to the l1 ball and the box, by a solver: z = p - q with p, q >= 0."""
    x, d = clean.flatten().numpy(), (moved - clean).flatten().numpy()
    n = len(x)
    result = minimize(
        lambda z: ((z[:n] - z[n:] - d) ** 2).sum(),
        np.zeros(2 * n),
        jac=lambda z: np.concatenate([2 * (z[:n] - z[n:] - d), -2 * (z[:n] - z[n:] - d)]),
        bounds=[(0, 1 - value) for value in x] + [(0, value) for value in x],
        constraints={"type": "ineq", "fun": lambda z: epsilon - z.sum(), "jac": lambda z: -np.ones(2 * n)},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return result.fun


@pytest.mark.parametrize("epsilon", [0.3, 1.5, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_l1_projection_is_the_nearest_point_of_ball_and_box(seed, epsilon):
    clean, change = drawn(seed)
    moved = clean + change
    result = project(clean, moved, epsilon, "l1")
    assert float(size(result - clean, "l1")) <= epsilon + 1e-9 and result.min() >= 0 and result.max() <= 1
    assert float((result - moved).square().sum()) == pytest.approx(nearest(clean, moved, epsilon), abs=1e-6)


def test_l1_projection_leaves_points_inside_and_keeps_images_apart():
    clean, change = drawn(7, count=4)
    inside = clean + 0.01 * change.sign() * (clean > 0.1) * (clean < 0.9)
    assert torch.allclose(project(clean, inside, 1.0, "l1"), inside, atol=1e-12)
    alone = [project(clean[i : i + 1], (clean + change)[i : i + 1], 0.7, "l1") for i in range(4)]
    assert torch.allclose(project(clean, clean + change, 0.7, "l1"), torch.cat(alone), atol=1e-12)


def test_linf_and_l2_projections_by_hand():
    clean = torch.tensor([0.5, 0.95, 0.0]).view(1, 3, 1, 1)
    moved = torch.tensor([0.9, 1.5, -0.4]).view(1, 3, 1, 1)
    assert project(clean, moved, 0.1, "linf").flatten().tolist() == pytest.approx([0.6, 1.0, 0.0])
    moved = clean + torch.tensor([0.3, 0.0, 0.4]).view(1, 3, 1, 1)
    assert project(clean, moved, 0.25, "l2").flatten().tolist() == pytest.approx([0.65, 0.95, 0.2])
    assert torch.allclose(project(clean, moved, 0.6, "l2"), moved)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steepest_steps_gain_most_among_steps_of_their_norm(norm):
    images, gradient = drawn(1, count=3, side=4)
    step = steepest(gradient, images, 0.3, norm)
    assert torch.allclose(size(step, norm), torch.full((3,), 0.3).double())
    gain = (step * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    assert torch.allclose(gain, 0.3 * dual)
    for seed in range(100, 150):
        other = drawn(seed, count=3, side=4)[1]
        other = 0.3 * other / size(other, norm).view(-1, 1, 1, 1)
        assert bool(((other * gradient).flatten(1).sum(1) < gain).all())


def test_l1_steps_go_to_the_largest_entries_that_can_move():
    generator = torch.Generator().manual_seed(0)
    images = torch.full((1, 3, 10, 10), 0.5)
    gradient = torch.randn(1, 3, 10, 10, generator=generator)
    gradient[0, :, 0, 0] = torch.tensor([90.0, -80.0, 70.0])
    images[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])  # the first two are pushed out of [0, 1], the third into it
    step = steepest(gradient, images, 2.0, "l1")
    changed = step.flatten().nonzero().flatten()
    movable = gradient.abs().clone()
    movable[0, :2, 0, 0] = 0
    assert sorted(changed.tolist()) == sorted(movable.flatten().topk(3).indices.tolist())  # 1 % of 300
    assert float(step.abs().sum()) == pytest.approx(2.0) and bool((step * gradient >= 0).all())


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_fill_the_ball_by_the_seed_of_each_image(norm, edge):
    images = torch.full((200, 3, 4, 4), 0.5)
    radius = {"linf": 0.1, "l2": 0.4, "l1": 2.0}[norm]
    starts = random_start(images, radius, norm, list(range(200)), edge=edge)
    share = size(starts - images, norm) / radius
    assert share.max() <= 1 + 1e-5
    if edge:
        assert share.min() > 1 - 1e-4
    elif norm != "linf":
        assert share.min() < 0.05 and 0.4 < share.mean() < 0.6  # a uniform radius
    again = random_start(images[:2], radius, norm, [5, 17], edge=edge)
    assert torch.allclose(again, starts[[5, 17]]) and not torch.allclose(starts[0], starts[1])


@pytest.mark.parametrize("norm", NORMS)
def test_rounding_of_every_pixel_is_within_the_budget(norm):
    """The numbers of a photograph are rounded to 2^-24 each, which adds up in l1."""
    generator = torch.Generator().manual_seed(0)
    clean = 0.4 + 0.2 * torch.rand(2, 3, 96, 96, generator=generator)
    change = torch.randn(clean.shape, generator=generator)
    assert size_of_all(clean[:1], norm) == pytest.approx(float(size(torch.ones_like(clean), norm)[0]))
    epsilon = 1e-3 * size_of_all(clean, norm)
    moved = project(clean, clean + change, epsilon, norm)
    assert torch.equal(within_budget(clean, moved, epsilon, norm, "x"), moved)
    with pytest.raises(RuntimeError, match="left its budget"):
        within_budget(clean, clean + 1.002 * (moved - clean), epsilon, norm, "x")
