"""The stopwatch: rotation, ratios inside a round, and that nothing leaks into the process."""

from __future__ import annotations

import pytest
import torch

from vismt.bench import core, timing


def test_every_candidate_runs_once_a_round_in_rotating_order() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    before = torch.get_num_threads()
    found = timing.interleave(candidates, 3, label="test", warmup=1)
    assert "".join(calls) == "abcbcacababc" and torch.get_num_threads() == before
    assert all(len(seconds) == 3 for seconds in found.seconds.values())


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    found = timing.Timing({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 3.0]})
    # by round 0.5, 2, 3: median 2; the ratio of the medians would be 4 / 2 = 2 as well, so move one round: 1, 4, 9 over 2, 2, 90
    assert found.ratio("a", "b") == (2.0, 0.5, 3.0)
    moved = timing.Timing({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 90.0]})
    # by round 0.5, 2, 0.1: median 0.5; the ratio of the medians would be 4 / 2 = 2
    assert moved.ratio("a", "b") == (0.5, 0.1, 2.0)


@pytest.mark.slow
def test_core_bench_measures_every_variant() -> None:
    pytest.importorskip("peft")
    results = core.run(rounds=1)
    for result in results:
        ours, theirs = result.saved_bytes["vismt lora"], result.saved_bytes["peft lora"]
        assert ours <= theirs, "saved activations must be no more than peft's"
        assert result.saved_bytes["head only (floor)"] < 0.1 * ours
        assert all(name in str(result) for name in ("vismt pissa", "full fine-tuning", "head only (floor)"))
