"""FAB-T: its projection against solvers, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.attack_parts import CLASSES, KEYS, survivors, victim_case
from scipy.optimize import linprog, minimize

from vismt.base.norm_balls import size
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.fab import boundary_step


def smallest(x, w, rise, norm):
    """Return the norm of the smallest change d with w.d = rise and x + d in [0, 1], by a solver; None where there is none."""
    n = len(x)
    bounds = [(-value, 1 - value) for value in x]
    if norm == "linf":  # min t with |d_i| <= t
        limits = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
        cost, equal = np.append(np.zeros(n), 1), np.append(w, 0)[None]
        result = linprog(cost, limits, np.zeros(2 * n), equal, [rise], [*bounds, (0, None)])
    elif norm == "l1":  # min sum p + q with d = p - q
        halves = [(0, 1 - value) for value in x] + [(0, value) for value in x]
        result = linprog(np.ones(2 * n), A_eq=np.append(w, -w)[None], b_eq=[rise], bounds=halves)
    else:
        constraint = {"type": "eq", "fun": lambda d: w @ d - rise, "jac": lambda d: w}
        start = np.array([high if w_i * rise > 0 else low for (low, high), w_i in zip(bounds, w)]) / 2
        options = {"maxiter": 500, "ftol": 1e-14}
        result = minimize(
            lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=bounds, constraints=constraint, options=options
        )
        return result.fun**0.5 if result.success else None
    return result.fun if result.success else None


def step(x, w, rise, norm):
    change = boundary_step(torch.tensor(x)[None], torch.tensor(w)[None], torch.tensor([rise]), norm)
    return change[0].numpy()


ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_step_to_the_boundary_is_the_smallest_in_the_box(norm):
    generator, clipped = np.random.default_rng(0), 0
    for _ in range(25):
        x = generator.uniform(-0.2, 1.2, 6).clip(0, 1)  # some pixels at the border
        w = generator.normal(size=6) * generator.integers(0, 3, 6)  # some pixels without influence
        room = np.where(w > 0, 1 - x, x) @ np.abs(w)
        for share in (0.2, 0.7, 0.95):
            rise = share * room
            d = step(x, w, rise, norm)
            assert w @ d == pytest.approx(rise, abs=1e-9) and (x + d).min() >= -1e-12 and (x + d).max() <= 1 + 1e-12
            assert np.linalg.norm(d, ORDER[norm]) == pytest.approx(smallest(x, w, rise, norm), abs=1e-5)
            clipped += ((x + d < 1e-9) | (x + d > 1 - 1e-9)).any()
    assert clipped > 20  # the box mattered


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_boundary_out_of_the_box_takes_all_the_room(norm):
    x, w = np.array([0.2, 0.5, 0.9, 0.4]), np.array([1.0, -2.0, 0.5, 0.0])
    assert smallest(x, w, 10.0, norm) is None
    assert (x + step(x, w, 10.0, norm)).tolist() == pytest.approx([1, 0, 1, 0.4])
    assert (x + step(x, w, -10.0, norm)).tolist() == pytest.approx([0, 1, 0, 0.4])
    assert (step(x, 0 * w, 1.0, norm) == 0).all()


def test_rows_are_solved_on_their_own():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(5, 8, generator=generator).double(), torch.randn(5, 8, generator=generator).double()
    rise = torch.tensor([0.1, 5.0, 0.0, -0.4, 1e-9]).double()
    for norm in ORDER:
        rows = [boundary_step(x[i : i + 1], w[i : i + 1], rise[i : i + 1], norm) for i in range(5)]
        assert torch.allclose(boundary_step(x, w, rise, norm), torch.cat(rows), atol=1e-12)


def test_fab_ends_at_the_first_image_in_the_budget_and_keeps_the_others():
    net, clean, labels = victim_case()
    left = survivors(AttackSpec("fab", 0.08, steps=20))
    spec = AttackSpec("fab", 0.08, steps=20)
    result = spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS)
    assert torch.equal(result[left], clean[left])
    assert size(result - clean, "linf")[~left].min() > 0.02  # near the boundary, not a random point
