"""The quality of an episode's probabilities, with the arithmetic in comments, and the measures of several episodes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vismt.metatune.protocol.episode_outcome import EpisodeOutcome
from vismt.metatune.protocol.episodes import Episode
from vismt.uncertainty.probability_metrics import group_measures


def outcome(p: list[list[float]], labels: list[int]) -> EpisodeOutcome:
    """Return the outcome of an episode whose clean queries have the probabilities p. The images play no part."""
    none, query_labels = torch.zeros(0), torch.tensor(labels)
    episode = Episode(torch.arange(3), torch.arange(3), torch.arange(len(p)), query_labels, torch.arange(3))
    logits = torch.tensor(p).log() + 5  # the same softmax
    return EpisodeOutcome(episode, none, none, {"clean": logits.argmax(1)}, logits, None)


CLEAN, NLL, BRIER, GAPS = {"clean": 1.0}, "clean nll", "clean brier", "clean gaps"
TWO = outcome([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], [0, 2])  # right, wrong
ONE = outcome([[0.5, 0.3, 0.2]], [0])  # right


def test_a_two_query_episode_by_hand() -> None:
    row = TWO.record(CLEAN)
    # (-log 0.7 - log 0.2) / 2 = 0.983; with the predicted class in place of the label it would be 0.525.
    assert row[NLL] == pytest.approx((-math.log(0.7) - math.log(0.2)) / 2, abs=1e-6)
    # (0.3^2 + 0.2^2 + 0.1^2) = 0.14 and (0.5^2 + 0.3^2 + 0.8^2) = 0.98; over the largest probability alone 0.09 and 0.25.
    assert row[BRIER] == pytest.approx((0.14 + 0.98) / 2, abs=1e-6)
    # Bins of 1/15: 0.7 lies in bin 10, right, (1 - 0.7) / 2; 0.5 in bin 7, wrong, (0 - 0.5) / 2.
    gaps = torch.tensor(row[GAPS])
    assert gaps.nonzero().flatten().tolist() == [7, 10]
    assert gaps[[7, 10]].tolist() == pytest.approx([-0.25, 0.15], abs=1e-6)
    assert TWO.record({}) == {"clean": 0.5, "clean right": "10"}
    # T = 1/2 squares the odds: 0.49 / (0.49 + 0.04 + 0.01) and 0.04 / (0.25 + 0.09 + 0.04).
    tempered = TWO.record({"tempered": 0.5})
    assert tempered["tempered nll"] == pytest.approx((-math.log(0.49 / 0.54) - math.log(0.04 / 0.38)) / 2, abs=1e-6)
    assert set(tempered) == {"clean", "clean right", "tempered nll", "tempered brier", "tempered gaps"}


def test_the_calibration_error_pools_episodes_before_it_takes_absolute_values() -> None:
    rows = [TWO.record(CLEAN), ONE.record(CLEAN)]
    results: dict[str, Tensor] = {
        name: torch.tensor([row[name] for row in rows]).double() for name in (NLL, BRIER, GAPS)
    }
    ece, nll, brier = group_measures(["0", "1"], "clean", results)
    # Bin 7: (-0.25 + 0.5) / 2 = 0.125, bin 10: 0.15 / 2 = 0.075. The mean of the episodes' own errors would be 0.45, and
    # pooled queries would have (|-0.5 + 0.5| + 0.3) / 3 = 0.1.
    assert ece.score == pytest.approx(0.2, abs=1e-6) and ece.error is not None and not ece.paired
    # The accuracies, 0.5 and 1, are averaged in the same way: episodes weigh the same, whatever their number of queries.
    assert nll.score == pytest.approx(((-math.log(0.7) - math.log(0.2)) / 2 - math.log(0.5)) / 2, abs=1e-6)
    assert brier.score == pytest.approx((0.56 + 0.38) / 2, abs=1e-6)  # 0.5^2 + 0.3^2 + 0.2^2 = 0.38
    assert {measure.better for measure in (ece, nll, brier)} == {"lower"}
