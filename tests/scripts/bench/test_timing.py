"""Interleaved timing: rotation, ratios within a round, and a process that is restored."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import core, timing


def test_every_candidate_runs_once_a_round_in_rotating_order() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    before = torch.get_num_threads()
    result = timing.interleave(candidates, 3, label="test", warmup=1)
    assert "".join(calls) == "abcbcacababc" and torch.get_num_threads() == before
    assert all(len(seconds) == 3 for seconds in result.seconds.values())


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    times = timing.Timing({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 3.0]})
    # By round 0.5, 2, 3: median 2. The ratio of the medians, 4 / 2, is 2 as well, so another last round follows.
    assert times.ratio("a", "b") == (2.0, 0.5, 3.0)
    moved = timing.Timing({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 90.0]})
    # By round 0.5, 2, 0.1: median 0.5; the ratio of the medians is 4 / 2 = 2.
    assert moved.ratio("a", "b") == (0.5, 0.1, 2.0)


@pytest.mark.slow
def test_core_bench_measures_every_variant() -> None:
    pytest.importorskip("peft")
    results = core.run(rounds=1)
    for result in results:
        saved, saved_by_peft = result.saved_bytes["vismt lora"], result.saved_bytes["peft lora"]
        assert saved <= saved_by_peft, "saved activations must be no more than peft's"
        assert result.saved_bytes["head only (floor)"] < 0.1 * saved
        assert all(name in str(result) for name in ("vismt pissa", "full fine-tuning", "head only (floor)"))
