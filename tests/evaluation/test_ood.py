"""The AUROC of the largest probability by hand."""

from __future__ import annotations

import pytest
import torch

from vismt.evaluation.ood import Ood
from vismt.uncertainty.features import Answers


def test_the_largest_probability_separates_outside_images() -> None:
    # Largest probabilities 0.7 and 0.5 inside, 0.6, 0.45 and 0.4 outside: of six pairs 0.7 wins three, 0.5 two. The logits
    # outside are shifted, so that the largest logits give another share.
    inside = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]).log()
    p = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.45, 0.25], [0.3, 0.3, 0.4]])
    outside = p.log() + torch.tensor([[90.0], [-90.0], [0.0]])
    nothing = torch.zeros(3, dtype=torch.int64)
    found = Ood(["other"]).means(Answers(inside, nothing[:2]), {"other": Answers(outside, nothing)})
    assert list(found.values()) == [pytest.approx(5 / 6, abs=1e-6)]
