"""Square: what it keeps, its windows, its ball, its outcome against torchattacks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.attack_parts import CLASSES, KEYS, victim_case

from vismt.robustness import square as module
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.losses import margin
from vismt.robustness.norms import size

BUDGETS = [("linf", 0.13), ("l2", 2.2)]


def test_the_window_is_halved_at_nine_points_of_the_search():
    shares = [module._share(number, 10_000) for number in range(10_000)]
    assert shares[:11] == [0.8] * 11 and shares[11] == 0.4
    changes = [number for number in range(1, 10_000) if shares[number] != shares[number - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert all(shares[number] == shares[number - 1] / 2 for number in changes)
    assert module._share(499, 5000) == shares[998]  # the points scale with the number of queries


def test_a_linf_query_moves_one_square_window_to_corners_of_the_ball():
    clean = torch.full((2, 3, 20, 20), 0.5)
    for share in (0.8, 0.1, 0.0025, 1e-6):
        moved = module._propose_linf(clean, clean, 0.1, share, torch.Generator().manual_seed(1))
        rows, columns = (moved != clean).any(3)[0, 0].nonzero(), (moved != clean).any(2)[0, 0].nonzero()
        side = max(1, round((share * 400) ** 0.5))
        assert len(rows) == len(columns) == side and int((moved != clean).sum()) == 2 * 3 * side**2
        assert torch.allclose((moved - clean).abs()[moved != clean], torch.tensor(0.1))


@pytest.mark.parametrize(("norm", "epsilon"), BUDGETS)
def test_a_kept_image_is_in_the_ball_and_its_margin_never_falls_back(norm, epsilon, monkeypatch):
    net, clean, labels = victim_case()
    kept = []

    def watched(victim, wave, *arguments):
        value, images = query(victim, wave, *arguments)
        kept.append((value, images))
        return value, images

    query = module._query
    monkeypatch.setattr(module, "_query", watched)
    spec = AttackSpec("square", epsilon, norm=norm, steps=80)
    result = spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS, exhaust=True)
    assert len(kept) == 80 and torch.equal(kept[-1][1], result)
    for (before, _), (value, images) in pairwise(kept):
        assert bool((value >= before).all()) and size(images - clean, norm).max() <= epsilon + 1e-5
        assert torch.allclose(value, margin(net(images.double()), labels).to(value), atol=1e-5)
    assert bool((kept[-1][0] > kept[0][0] + 0.1).any())
