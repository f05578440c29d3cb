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


def test_the_table_gives_medians_ratios_sizes_and_targets() -> None:
    times = timing.Timing({"ours": [1.0, 2.0, 9.0], "plain": [1.0, 1.0, 10.0], "as released": [2.0, 2.0, 10.0]})
    sizes = {timing.SAVED: {"ours": 1_500_000, "plain": 1_000_000, "as released": 3_000_000}}
    targets = [("ours", "plain", 1.1), ("ours", "as released", 1.02)]
    aims = [(timing.SAVED, "ours", "as released", 0.6)]
    lines = str(timing.Ratios("step", times, targets, sizes=sizes, size_targets=aims)).splitlines()
    heads = [part.strip() for part in lines[1].split("  ") if part.strip()]
    assert lines[0] == "step" and heads == ["CPU seconds", "vs plain", "vs as released", "saved activations, MB"]
    assert lines[2].split() == ["ours", "2.0000", "1.000", "0.900", "1.5"]
    assert lines[5:] == [
        "time of ours / plain: 1.000 (0.900..2.000), target at most 1.10",
        "time of ours / as released: 0.900 (0.500..1.000), target at most 1.02",
        "saved activations of ours / as released: 0.500 (0.500..0.500), target at most 0.60",
    ]


@pytest.mark.slow
def test_core_bench_measures_every_variant() -> None:
    results = core.run(rounds=1)
    for result in results:
        saved, saved_by_peft = result.sizes[timing.SAVED]["vismt lora"], result.sizes[timing.SAVED]["peft lora"]
        assert saved <= saved_by_peft, "saved activations must be no more than peft's"
        assert result.sizes[timing.SAVED]["head only (floor)"] < 0.1 * saved
        assert all(name in str(result) for name in ("vismt pissa", "full fine-tuning", "head only (floor)"))
