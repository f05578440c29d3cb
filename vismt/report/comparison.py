"""Rows of results.jsonl set beside each other: which arm is best, and which are its statistical ties.

Two arms are compared on the same examples when both left records that reproduce their numbers: a tie is then an interval of
the paired difference that contains zero. Without such records it is an overlap of the two intervals.

Rows of arms with several trainings have intervals over examples and seeds together (vismt.uncertainty.intervals.with_seeds),
and so have their differences and their averages over sets. Seeds are paired where two arms have the same. A seed moves all sets
together, so that the part of the seeds in an average is that of one average over the sets for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Protocol

from vismt.report.results import Result
from vismt.uncertainty.intervals import LOWER, domain_average, mean_interval, paired_bootstrap, with_seeds

AVERAGE = "average"
FROZEN = "frozen"  # an arm of this name stands first and is drawn in grey
Values = dict[str, float]


class ExampleValues(Protocol):
    """Values by example of rows, `vismt.report.results.ValuesByExample` for those of one run."""

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example; None where there are none."""


class Evidence:
    """What the intervals of rows without a seed follow from: values by example, and the rows of the single trainings.

    Args:
        results: all rows.
        values: of the results.
    """

    def __init__(self, results: Sequence[Result], values: ExampleValues) -> None:
        self._of = cache(values.of)
        self._trainings: dict[tuple[Any, ...], dict[int, Result]] = {}
        for row in results:
            if row.seed is not None:
                self._trainings.setdefault(replace(row, seed=None).key, {})[row.seed] = row

    def seeds(self, rows: Sequence[Result]) -> dict[int, float]:
        """Return the mean over some sets by training seed; {} for a single training."""
        by_set = [self._trainings.get(row.key, {}) for row in rows]
        shared = [seed for seed in by_set[0] if all(seed in trainings for trainings in by_set)]
        return {seed: math.fsum(trainings[seed].value for trainings in by_set) / len(by_set) for seed in shared}

    def half(self, rows: Sequence[Result]) -> float:
        """Return the half width of the 95 % interval of an arm's mean over sets."""
        seeds = self.seeds(rows)
        if len(rows) == 1 or not seeds:
            return math.sqrt(math.fsum(row.half**2 for row in rows)) / len(rows)
        halves = math.sqrt(math.fsum(self._half_over_examples(row) ** 2 for row in rows)) / len(rows)
        return with_seeds(halves, list(seeds.values()))

    def _half_over_examples(self, row: Result) -> float:
        values = self._of(row)
        if values is not None and len(values) > 1:
            return mean_interval(list(values.values()))[1]
        trainings = self._trainings[row.key].values()
        return math.fsum(training.half for training in trainings) / len(trainings)

    def mean_difference(self, first: Sequence[Result], second: Sequence[Result]) -> tuple[float, float] | None:
        """Return (mean over sets of first - second, half width) on the same examples; None when a set has none."""
        differences = {}
        for a, b in zip(first, second, strict=True):
            both = _aligned(self._of(a), self._of(b))
            if both is None:
                return None
            differences[a.data] = [x - y for x, y in zip(*both, strict=True)]
        mean, half = domain_average(differences)
        left, right = self.seeds(first), self.seeds(second)
        if left.keys() == right.keys():
            return mean, with_seeds(half, [left[seed] - right[seed] for seed in left])
        return mean, with_seeds(half, list(left.values()), list(right.values()))

    def difference(self, first: Sequence[Result], second: Sequence[Result]) -> tuple[float, float, float] | None:
        """Return (mean over sets of first - second, low, high) on the same examples; None when a set has none.

        Of single trainings on one set the interval is a bootstrap's.
        """
        if len(first) == 1 and not self.seeds(first) and not self.seeds(second):
            both = _aligned(self._of(first[0]), self._of(second[0]))
            return None if both is None else paired_bootstrap(*both)[:3]
        found = self.mean_difference(first, second)
        return None if found is None else (found[0], found[0] - found[1], found[0] + found[1])


@dataclass(frozen=True)
class Cell:
    """One number: mean, half width of its 95 % interval, n; mark is "best", "tie" or "" (also when nothing to compare).

    seeds: number of trainings, whose spread the interval has; 0 for a single one.
    """

    value: float
    half: float
    n: int
    mark: str = ""
    seeds: int = 0


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

    evidence = Evidence(results, values)
    comparisons: list[Comparison] = []
    for _, table in groupby(sorted(rows, key=order), key=block):
        groups = [
            sorted(group, key=lambda row: row.arm != FROZEN)
            for _, group in groupby(table, key=lambda row: (row.data, row.condition))
        ]
        comparisons += [_compare(group[0].data, [[row] for row in group], evidence) for group in groups]
        if all(group[0].data != AVERAGE for group in groups):
            comparisons += _averages(groups, evidence)
    return comparisons


def _averages(groups: Sequence[Sequence[Result]], evidence: Evidence) -> Iterable[Comparison]:
    """Yield the mean over sets of each condition that two or more sets and all have, each set weighing the same.

    The variance over the examples is that within the sets, sum of the sets' / D^2; of paired differences likewise.
    """
    sets = len({group[0].data for group in groups})
    for condition in dict.fromkeys(group[0].condition for group in groups):
        chosen = [group for group in groups if group[0].condition == condition]
        arms = [row.arm for row in chosen[0]]
        if sets > 1 and len(chosen) == sets and all([row.arm for row in group] == arms for group in chosen):
            yield _compare(AVERAGE, list(zip(*chosen, strict=True)), evidence)


def _compare(data: str, columns: Sequence[Sequence[Result]], evidence: Evidence) -> Comparison:
    """Return the comparison of arms under one condition. columns: the rows of each arm, one for each set."""
    values = [math.fsum(row.value for row in rows) / len(rows) for rows in columns]
    halves = [evidence.half(rows) for rows in columns]
    choose = min if columns[0][0].better == LOWER else max
    best = choose(range(len(values)), key=values.__getitem__)
    several = len(columns) > 1
    paired = several
    cells = {}
    for number, rows in enumerate(columns):
        mark = "best" if several else ""
        if number != best:
            pair = evidence.difference(columns[best], rows)
            paired = paired and pair is not None
            overlap = abs(values[best] - values[number]) <= halves[best] + halves[number]
            tied = overlap if pair is None else pair[1] <= 0 <= pair[2]
            mark = "tie" if tied else ""
        count = sum(row.n for row in rows)
        cells[rows[0].arm] = Cell(values[number], halves[number], count, mark, len(evidence.seeds(rows)))
    difference = evidence.difference(columns[1], columns[0]) if len(columns) == 2 else None
    return Comparison(columns[0][0], data, cells, difference, paired)


def _aligned(a: Values | None, b: Values | None) -> tuple[list[float], list[float]] | None:
    """Return two arms' values of the same examples in one order; None where the examples differ."""
    if a is None or b is None or a.keys() != b.keys() or len(a) < 2:
        return None
    return list(a.values()), [b[key] for key in a]
