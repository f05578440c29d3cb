"""The check by growing radii: numbers by hand, a smooth model that passes and a quantised model that fails."""

import pytest
import torch
from helpers.attack_parts import Channels, Colours

from vismt.metatune import EpisodeSampler, ProtoNet
from vismt.metatune.protocol.episodes import DisjointSampler
from vismt.robustness.masking import RADII, check_episodes, judge_curve


class Misleading(Channels):
    """The same function of a few grey values, with a small smooth term whose gradient points back to the class."""

    def forward(self, images):
        return super().forward((images * 4).round() / 4) - 1e-3 * super().forward(images)


def check(backbone, **options):
    sampler = EpisodeSampler(Colours.labels, ways=5, shots=2, queries=5, seed=1)
    return check_episodes(ProtoNet(backbone), Colours(0.1, 8), sampler, episodes=4, **options)


def test_an_honest_model_passes():
    result = check(Channels())
    assert result.epsilons == RADII and result.n == 4 and result.chance == pytest.approx(0.2)
    assert result.accuracies[0] > 0.7 and result.accuracies[-1] <= 0.2 and result.passed
    assert result.reach == pytest.approx(2.5) and result.gap >= 0
    assert result.verdict() == f"pass; {100 * result.gap:+.1f} points against strong at 4.5/255"


def test_masked_gradients_fail_although_the_function_is_nearly_the_same():
    result = check(Misleading())
    assert not result.reaches_chance and not result.passed
    last = f"still {100 * result.accuracies[-1]:.1f} % at 64/255, chance is 20.0 %"
    assert result.verdict().startswith("FAIL: ") and last in result.verdict()


def test_a_sampler_that_ends_has_fewer_episodes_than_asked_for():
    sampler = DisjointSampler(Colours.labels, ways=5, shots=1, queries=3, seed=1)
    result = check_episodes(ProtoNet(Channels()), Colours(0.1, 8), sampler, episodes=10, radii=(0.0, 64 / 255))
    assert result.n == len(sampler) == 3 and result.chance == pytest.approx(0.2)


def test_it_resumes(tmp_path):
    records = tmp_path / "masking" / "a.jsonl"
    first = check(Channels(), records=records)
    written = records.read_text()
    assert check(Channels(), records=records) == first and records.read_text() == written


def curve(*columns):
    return {radius: torch.tensor(values) for radius, values in zip((0.0, 1 / 255, 64 / 255), columns)}


def test_a_rise_counts_when_it_is_more_than_noise():
    # every episode rises by 0.1: no width, more than the slack
    steady = judge_curve(curve([0.5, 0.5, 0.5], [0.6, 0.6, 0.6], [0.0, 0.0, 0.0]), 0.2)
    assert not steady.monotone and steady.reaches_chance
    assert steady.verdict() == "FAIL: rises from 50.0 % at 0/255 to 60.0 % at 1/255"
    # rises of 0.3, -0.1, 0.1: the same mean 0.1 with a half width of 4.303 * 0.2 / sqrt(3) = 0.497
    noisy = judge_curve(curve([0.5, 0.5, 0.5], [0.8, 0.4, 0.6], [0.0, 0.0, 0.0]), 0.2)
    assert noisy.monotone and noisy.passed
    assert judge_curve(curve([0.5, 0.5], [0.51, 0.51], [0.0, 0.0]), 0.2).monotone  # within the slack


def test_the_end_must_reach_chance():
    # 0.25 without width is above 0.2; 0.1 and 0.4 have the mean 0.25 and a half width of 1.9
    assert not judge_curve(curve([0.9, 0.9], [0.8, 0.8], [0.25, 0.25]), 0.2).reaches_chance
    assert judge_curve(curve([0.9, 0.9], [0.8, 0.8], [0.1, 0.4]), 0.2).reaches_chance
    assert judge_curve(curve([0.9, 0.9], [0.8, 0.8], [0.0, 0.0]), 0.2).passed
