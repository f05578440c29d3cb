"""Prediction intervals of a re-run: their width, and how often honest re-runs are inside."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import pytest
import torch
from helpers.results import result

from scripts.reproduction import predicted, verdicts
from scripts.study_rows import About, StudyRow, StudyRows


def row(variance: float = 0.0004, freedom: float = 1e9, **changes: Any) -> StudyRow:
    return StudyRow(**vars(result(**{"scale": "number", "variance": variance, "freedom": freedom, **changes})))


def study(*rows: StudyRow) -> StudyRows:
    return StudyRows(About("t", "c", rows[0].config_hash, {}, [], "", "", {}, "", "", 1.0), list(rows))


def test_of_one_training_the_interval_has_the_error_of_both_numbers() -> None:
    low, high = predicted(row(), [], 1, 0.95)
    assert (low, high) == pytest.approx((0.4 - 1.96 * math.sqrt(2) * 0.02, 0.4 + 1.96 * math.sqrt(2) * 0.02), abs=1e-4)
    few = predicted(row(freedom=4), [], 1, 0.95)
    assert few[1] - 0.4 == pytest.approx(2.776 * math.sqrt(2) * 0.02, abs=1e-4)


def test_a_share_stays_one() -> None:
    assert predicted(row(1.0, scale="share"), [], 1, 0.95) == (0.0, 1.0)
    difference = StudyRow(**{**vars(row(1.0, scale="share")), "minus": "other"})
    assert predicted(difference, [], 1, 0.95) == (-1.0, 1.0)


def test_fewer_trainings_of_the_re_run_widen_the_interval_by_their_part_alone() -> None:
    scores = [0.3, 0.4, 0.5]
    halves = [predicted(row(variance=0.0), scores, again, 0.95)[1] - 0.4 for again in (1, 3, 10**9)]
    assert halves == pytest.approx([4.3027 * 0.1 * math.sqrt(part) for part in (4 / 3, 2 / 3, 1 / 3)], abs=1e-4)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_an_honest_re_run_is_inside_as_often_as_the_level_says(spread: float) -> None:
    """Four trainings each; examples with error 1 and 30 degrees of freedom. Standard error of the share: 0.8 points."""
    draw = torch.Generator().manual_seed(0)
    inside = confident = 0
    for _ in range(800):
        seeds = (spread * torch.randn(2, 4, generator=draw, dtype=torch.float64)).tolist()
        errors = torch.randn(2, generator=draw, dtype=torch.float64).tolist()
        variance = float(torch.randn(30, generator=draw, dtype=torch.float64).square().mean())
        scores = [seed + errors[0] for seed in seeds[0]]
        committed = row(variance, 30.0, value=mean(scores))
        low, high = predicted(committed, scores, 4, 0.95)
        again = mean(seeds[1]) + errors[1]
        inside += low <= again <= high
        confident += abs(again - committed.value) <= (high - low) / 2 / math.sqrt(2)
    assert 0.93 <= inside / 800 <= 0.975 and confident / 800 < 0.92


def test_all_numbers_of_an_honest_re_run_are_inside_by_95_percent() -> None:
    rows = [row(value=0.0, variance=1.0, arm=f"arm {number}") for number in range(20)]
    half = verdicts(study(*rows), study(*rows))[0].high
    errors = math.sqrt(2) * torch.randn(4000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 0.94 <= float((errors.abs() <= half).all(1).double().mean()) <= 0.96


def test_verdicts_are_inside_outside_or_missing() -> None:
    arm = row()
    (inside,) = verdicts(study(arm), study(row(value=0.45)))
    (outside,) = verdicts(study(arm), study(row(value=0.46)))
    (missing,) = verdicts(study(arm), study(row(arm="other")))
    assert [verdict.word for verdict in (inside, outside, missing)] == ["inside", "outside", "missing"]
    (same,) = verdicts(study(row(variance=0.0)), study(row(variance=0.0)))
    assert same.word == "inside"
