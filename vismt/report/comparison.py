"""Rows of results.jsonl set beside each other: which arm is best, and which are its statistical ties.

Two arms are compared on the same examples when both left records that reproduce their numbers: a tie is then a paired
bootstrap interval of the difference that contains zero. Without such records it is an overlap of the two intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from vismt.report.results import Result
from vismt.stats import LOWER, domain_average, paired_bootstrap

AVERAGE = "average"
FROZEN = "frozen"  # an arm of this name stands first and is drawn in grey
Values = dict[str, float]


class ExampleValues(Protocol):
    """Values by example of rows, `vismt.report.results.ValuesByExample` for those of one run."""

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example; None where there are none."""


@dataclass(frozen=True)
class Cell:
    """One number: mean, half width of its 95 % interval, n; mark is "best", "tie" or "" (also when nothing to compare)."""

    value: float
    half: float
    n: int
    mark: str = ""


@dataclass(frozen=True)
class Comparison:
    """Arms by name under one condition of one protocol on one set (or the average over sets, `data` = "average").

    row: what all arms have in common; its arm, value and interval are those of the first.
    difference: (second - first arm, low, high) on the same examples; None unless there are two arms, paired.
    paired: whether all marks come from paired differences.
    """

    row: Result
    data: str
    cells: dict[str, Cell]
    difference: tuple[float, float, float] | None
    paired: bool

    @property
    def condition(self) -> str:
        """Text of the condition."""
        return self.row.condition

    @property
    def block(self) -> tuple[str, str, str, str]:
        """Task, protocol, metric and unit, which all numbers of one table share."""
        return block(self.row)


def block(row: Result) -> tuple[str, str, str, str]:
    """Return task, protocol, metric and unit of a row."""
    return (row.task, row.protocol, row.metric, row.unit)


def compare(results: Sequence[Result], values: ExampleValues) -> list[Comparison]:
    """Return one comparison per block, set and condition, by block, then sets, then conditions in the order of the results.

    Rows of single trainings (with a seed) are left out. values: gives the values by example of a row.
    """
    rows = [row for row in results if row.seed is None]
    blocks = list(dict.fromkeys(block(row) for row in rows))
    sets = list(dict.fromkeys(row.data for row in rows))
    conditions = list(dict.fromkeys(row.condition for row in rows))

    def order(row: Result) -> tuple[int, int, bool, int]:
        return blocks.index(block(row)), sets.index(row.data), row.condition != "clean", conditions.index(row.condition)

    comparisons: list[Comparison] = []
    for _, table in groupby(sorted(rows, key=order), key=block):
        groups = [
            sorted(group, key=lambda row: row.arm != FROZEN)
            for _, group in groupby(table, key=lambda row: (row.data, row.condition))
        ]
        by_example = {row.key: values.of(row) for group in groups for row in group}
        comparisons += [_compare(group, [by_example[row.key] for row in group]) for group in groups]
        if all(group[0].data != AVERAGE for group in groups):
            comparisons += _averages(groups, by_example)
    return comparisons


def _compare(group: Sequence[Result], examples: Sequence[Values | None]) -> Comparison:
    best = _best(group[0], [row.value for row in group])
    paired = len(group) > 1
    marks = []
    for number, row in enumerate(group):
        both = aligned(examples[best], examples[number])
        if number == best:
            marks.append("best" if len(group) > 1 else "")
            continue
        if both is None:
            paired = False
            tied = abs(group[best].value - row.value) <= group[best].half + row.half
        else:
            _, low, high, _ = paired_bootstrap(*both)
            tied = low <= 0 <= high
        marks.append("tie" if tied else "")
    difference = None
    if len(group) == 2:
        both = aligned(examples[1], examples[0])
        difference = None if both is None else paired_bootstrap(*both)[:3]
    cells = {row.arm: Cell(row.value, row.half, row.n, mark) for row, mark in zip(group, marks, strict=True)}
    return Comparison(group[0], group[0].data, cells, difference, paired)


def _averages(groups: Sequence[Sequence[Result]], examples: Mapping[tuple, Values | None]) -> Iterable[Comparison]:
    """Yield the mean over sets of each condition that two or more sets and all have, each set weighing the same.

    Its variance is that of the examples within the sets, sum of the sets' / D^2; paired differences likewise.
    """
    sets = len({group[0].data for group in groups})
    for condition in dict.fromkeys(group[0].condition for group in groups):
        chosen = [group for group in groups if group[0].condition == condition]
        arms = [row.arm for row in chosen[0]]
        if sets > 1 and len(chosen) == sets and all([row.arm for row in group] == arms for group in chosen):
            yield _average(chosen, arms, examples)


def _average(
    chosen: Sequence[Sequence[Result]], arms: Sequence[str], examples: Mapping[tuple, Values | None]
) -> Comparison:
    columns = list(zip(*chosen, strict=True))
    values = [math.fsum(row.value for row in rows) / len(rows) for rows in columns]
    halves = [math.sqrt(math.fsum(row.half**2 for row in rows)) / len(rows) for rows in columns]
    best = _best(chosen[0][0], values)
    pairs = [mean_difference(columns[best], rows, examples) for rows in columns]
    cells = {}
    for number, arm in enumerate(arms):
        pair = pairs[number]
        reach = pair[1] if pair else halves[best] + halves[number]
        mark = "tie" if abs(values[best] - values[number]) <= reach else ""
        if number == best:
            mark = "best"
        if len(arms) < 2:
            mark = ""
        cells[arm] = Cell(values[number], halves[number], sum(row.n for row in columns[number]), mark)
    step = mean_difference(columns[1], columns[0], examples) if len(arms) == 2 else None
    difference = (step[0], step[0] - step[1], step[0] + step[1]) if step else None
    paired = len(arms) > 1 and all(pair is not None for pair in pairs)
    return Comparison(chosen[0][0], AVERAGE, cells, difference, paired)


def mean_difference(
    first: Sequence[Result], second: Sequence[Result], examples: Mapping[tuple, Values | None]
) -> tuple[float, float] | None:
    """Return (mean over sets of first - second, half width) on the same examples; None when a set has none."""
    differences = {}
    for a, b in zip(first, second, strict=True):
        both = aligned(examples[a.key], examples[b.key])
        if both is None:
            return None
        differences[a.data] = [x - y for x, y in zip(*both, strict=True)]
    return domain_average(differences)


def _best(row: Result, values: Sequence[float]) -> int:
    """Return the position of the best of some values of a row's metric."""
    choose = min if row.better == LOWER else max
    return choose(range(len(values)), key=values.__getitem__)


def aligned(a: Values | None, b: Values | None) -> tuple[list[float], list[float]] | None:
    """Return two arms' values of the same examples in one order; None where the examples differ."""
    if a is None or b is None or a.keys() != b.keys() or len(a) < 2:
        return None
    return list(a.values()), [b[key] for key in a]
