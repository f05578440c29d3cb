"""The rule of a verdict, and what a claim's data may be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from helpers.results import result

from scripts.claim_rules import ClaimEvidence, contradict
from scripts.study_rows import About, StudyRow, StudyRows
from vismt.base.errors import UserError

ABOUT = About("", "", "", {}, [], "", "", {}, "", "", 0.0)


def verdict(low: float, high: float, scale: str = "number", **rule: float) -> str:
    row = StudyRow(**vars(result(scale=scale, value=(low + high) / 2, low=low, high=high)))
    return ClaimEvidence(study="s", arm="a", **rule).follows(row)  # type: ignore[arg-type]  # values of a rule


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (1.0, 3.0, "holds"),
        (0.5, 1.9, "holds weaker"),
        (0.5, 2.0, "holds"),
        (-1.0, 2.5, "undecided"),
        (-1.0, 1.9, "does not hold"),
        (-3.0, -1.0, "does not hold"),
        (0.0, 2.5, "undecided"),
    ],
)
def test_a_claim_of_a_size_is_judged_by_both_ends_of_the_interval(low: float, high: float, expected: str) -> None:
    assert verdict(low, high, above=0.0, claimed=2.0) == expected
    assert verdict(-high, -low, below=0.0, claimed=-2.0) == expected


def test_without_a_size_only_the_wrong_side_fails() -> None:
    assert verdict(0.1, 9.0, above=0.0) == "holds" and verdict(-1.0, 0.1, above=0.0) == "undecided"
    assert verdict(-1.0, -0.1, above=0.0) == "does not hold" and verdict(-1.0, 0.0, above=0.0) == "does not hold"
    assert verdict(-1.0, 0.5, above=-2.0) == "holds" and verdict(0.1, 0.3, below=0.0) == "does not hold"


def test_the_line_is_in_the_units_of_tables() -> None:
    assert verdict(-0.015, 0.01, "share", above=-2.0) == "holds"
    assert verdict(0.02, 0.03, "share", above=0.0, claimed=4.6) == "holds weaker"


@pytest.mark.parametrize("rule", [{"above": 0.0}, {"below": 0.0}])
def test_a_size_of_zero_is_a_size(rule: dict[str, float]) -> None:
    assert verdict(-1.0, 1.0, **rule, claimed=0.0) == "undecided"


def test_undecided_contradicts_nothing() -> None:
    assert contradict("holds", "does not hold") and contradict("does not hold", "holds weaker")
    assert not contradict("holds", "holds weaker") and not contradict("undecided", "does not hold")


@pytest.mark.parametrize(
    "values,words",
    [
        ({}, "one of study, test and why"),
        ({"study": "s", "why": "w", "arm": "a", "above": 0.0}, "one of study, test and why"),
        ({"study": "s", "above": 0.0}, "name the arm"),
        ({"study": "s", "arm": "a", "above": 0.0, "below": 1.0}, "one of above and below"),
    ],
)
def test_evidence_that_decides_nothing_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClaimEvidence(**values)


def test_a_claim_about_domains_is_judged_by_the_wider_interval() -> None:
    """Five sets with gains of -1 to 3: the mean 1 is far from 0 over new examples, and not over new domains."""

    def row(data: str, arm: str, value: float, half: float, minus: str = "") -> StudyRow:
        found = result(scale="number", value=value, low=value - half, high=value + half)
        return replace(StudyRow(**vars(found)), data=data, arm=arm, minus=minus, interval="examples")

    sets = [row(str(gain), "a", 10.0 + gain, 0.1) for gain in range(-1, 4)]
    sets += [row(str(gain), "b", 10.0, 0.1) for gain in range(-1, 4)]

    def follows(half: float, domains: bool) -> tuple[str, float]:
        average = row("average", "a", 1.0, half, minus="b")
        evidence = ClaimEvidence(study="s", arm="a", minus="b", metric=average.metric, above=0.0, domains=domains)
        found = evidence.find(StudyRows(ABOUT, [average, *sets]), "claims")
        return evidence.follows(found), found.half

    narrow, wide = follows(0.5, True), follows(3.0, True)
    assert follows(0.5, False) == ("holds", 0.5)
    assert narrow == (
        "undecided",
        pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3),
    )  # t(4) and the spread of the gains
    assert wide == ("undecided", 3.0)
