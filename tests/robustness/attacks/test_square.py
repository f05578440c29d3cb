"""Square: what it keeps, its windows, its ball, its outcome against torchattacks."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.attack_parts import CLASSES, COUNT, KEYS, seeds_of, survivors, victim_case, worst_iterates

from vismt.base.norm_balls import size
from vismt.robustness.attacks import active_set
from vismt.robustness.attacks import square as module
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.losses import margin

BUDGETS = [("linf", 0.16), ("l2", 2.2)]


def test_the_window_is_halved_at_nine_points_of_the_search():
    shares = [module._share(number, 10_000) for number in range(10_000)]
    assert shares[:11] == [0.8] * 11 and shares[11] == 0.4
    changes = [number for number in range(1, 10_000) if shares[number] != shares[number - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert all(shares[number] == shares[number - 1] / 2 for number in changes)
    assert module._share(499, 5000) == shares[998]  # the points scale with the number of queries


def test_a_linf_query_moves_one_square_window_to_corners_of_the_ball(monkeypatch):
    clean = torch.full((2, 3, 20, 20), 0.5)
    for share in (0.8, 0.1, 0.0025, 1e-6):
        monkeypatch.setattr(module, "_share", lambda number, queries, share=share: share)
        moves = module._draw_moves(clean, "linf", 2, torch.Generator().manual_seed(1))
        moved = module._propose_linf(clean, clean, 0.1, moves)
        side = max(1, round((share * 400) ** 0.5))
        for changed in moved != clean:
            assert changed[0].any(1).sum() == changed[0].any(0).sum() == side and int(changed.sum()) == 3 * side**2
        assert torch.allclose((moved - clean).abs()[moved != clean], torch.tensor(0.1))


def test_a_search_in_l2_starts_from_the_same_bump_in_five_by_five_tiles():
    clean = torch.full((2, 3, 20, 20), 0.5)
    change = module._bumps(SimpleNamespace(clean=clean, seeds=[1, 2]), 0.5) - clean
    assert torch.allclose(size(change, "l2"), torch.tensor(0.5))
    tiles = change.unfold(2, 4, 4).unfold(3, 4, 4).flatten(0, 3)
    assert torch.allclose(tiles.abs(), tiles[:1].abs(), atol=1e-6) and tiles[0].abs().amax() > 2 * tiles[0].abs().amin()


@cache
def in_turn(spec):
    """Ask one query after the other of all images; return the kept images and margins after each."""
    net, clean, labels = victim_case()
    start, propose = (
        (module._stripes, module._propose_linf) if spec.norm == "linf" else (module._bumps, module._propose_l2)
    )
    images = start(SimpleNamespace(clean=clean, seeds=seeds_of(spec)), spec.epsilon)
    moves, kept = module._draw_moves(clean, spec.norm, spec.length, torch.Generator().manual_seed(spec.seed)), []
    for number in range(spec.length):
        asked = images
        if number > 0:
            asked = propose(clean, images, spec.epsilon, moves.at(torch.full((COUNT,), number)))
        value = margin(net(asked.double()), labels)
        better = value > kept[-1][1] if kept else torch.ones(COUNT, dtype=torch.bool)
        images = torch.where(better[:, None, None, None], asked, images)
        kept.append((images, torch.where(better, value, kept[-1][1]) if kept else value))
    return kept


@pytest.mark.parametrize(("norm", "epsilon"), BUDGETS)
@pytest.mark.parametrize("fill", [1, 128])
def test_queries_asked_ahead_are_those_asked_in_turn(norm, epsilon, fill, monkeypatch):
    net, clean, labels = victim_case()
    monkeypatch.setattr(active_set, "CPU_FILL", fill)
    spec = AttackSpec("square", epsilon, norm=norm, steps=100, seed=3)
    kept = in_turn(spec)
    few = slice(0, COUNT, 7)  # of these, 128 // 9 = 14 queries at once
    full = spec.perturb(net, clean[few], labels[few], num_classes=CLASSES, keys=KEYS[few], exhaust=True)
    assert torch.allclose(full, kept[-1][0][few], atol=1e-6)
    expected = worst_iterates([images for images, _ in kept])
    assert torch.equal(survivors(spec), expected) and 0 < expected.sum() < COUNT


@pytest.mark.parametrize(("norm", "epsilon"), BUDGETS)
def test_a_kept_image_is_in_the_ball_and_its_margin_never_falls_back(norm, epsilon):
    clean = victim_case()[1]
    kept = in_turn(AttackSpec("square", epsilon, norm=norm, steps=80))
    for (_, before), (images, value) in pairwise(kept):
        assert bool((value >= before).all()) and size(images - clean, norm).max() <= epsilon + 1e-5
    assert bool((kept[-1][1] > kept[0][1] + 0.1).any())
