"""Rows of results.jsonl set beside each other: which arm is best, and which are its statistical ties.

Two arms are compared on the same examples when both left records that reproduce their numbers: a tie is then an interval of
the paired difference that contains zero. Without such records it is an overlap of the two intervals.

Rows of arms with several trainings have intervals over examples and seeds together (vismt.uncertainty.intervals.Estimate),
and so have their differences and their averages over sets. Seeds are paired where two arms have the same. A seed moves all sets
together, so that the part of the seeds in an average is that of one average over the sets for each seed. An average takes its
sets as a fixed list; of five or more it also has the interval that takes them as a sample of sets.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Protocol

from vismt.report.results import Result
from vismt.uncertainty.intervals import (
    LOWER,
    Covers,
    Estimate,
    average_of,
    estimate,
    interval_of,
    over_domains,
    student_quantile,
    without_seeds_kind,
)

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

    def interval(self, rows: Sequence[Result]) -> tuple[float, float, Covers]:
        """Return the 95 % interval of an arm's mean over sets, and what it covers."""
        if len(rows) == 1:
            return rows[0].low, rows[0].high, rows[0].interval
        found = self.estimate(rows)
        return *interval_of(found, rows[0].scale, sum(row.n for row in rows)), found.covers

    def estimate(self, rows: Sequence[Result]) -> Estimate:
        """Return an arm's mean over sets with its errors, that over the examples first."""
        return average_of([self._over_examples(row) for row in rows]).with_seeds(list(self.seeds(rows).values()))

    def _over_examples(self, row: Result) -> Estimate:
        """Return a row's score with its error over the examples alone, by the intervals where there are no values."""
        values = self._of(row)
        covers = without_seeds_kind(row.interval)
        if values is not None and len(values) > 1:
            return estimate(list(values.values()), parts=row.parts, covers=covers)
        return Estimate(row.value, (over_examples_alone(row, self._trainings.get(row.key, {}).values()),), covers)

    def difference(self, first: Sequence[Result], second: Sequence[Result]) -> Estimate | None:
        """Return the mean over sets of first - second on the same examples; None when a set has none.

        The error has that over the examples, part by part where the rows have parts, and that over the seeds: of the differences
        of trainings with the same seed where both arms have the same seeds, else of both arms.
        """
        differences = []
        for a, b in zip(first, second, strict=True):
            both = _aligned(self._of(a), self._of(b))
            if both is None or a.parts != b.parts:
                return None
            steps = [x - y for x, y in zip(*both, strict=True)]
            differences.append(estimate(steps, parts=a.parts, covers=without_seeds_kind(a.interval)))
        left, right = self.seeds(first), self.seeds(second)
        if left.keys() == right.keys():
            return average_of(differences).with_seeds([left[seed] - right[seed] for seed in left])
        return average_of(differences).with_seeds(list(left.values()), list(right.values()))


def over_examples_alone(row: Result, trainings: Collection[Result]) -> tuple[float, float]:
    """Return the variance and degrees of freedom of a row over its examples, by the rows of its trainings where it has them.

    The variance of a mean over trainings is at most that of one of them on average.
    """
    rows = list(trainings) or [row]
    freedom = (row.parts or row.n) - 1.0
    quantile = student_quantile(0.975, max(freedom, 1.0))
    return math.fsum((one.half / quantile) ** 2 for one in rows) / len(rows), freedom


@dataclass(frozen=True)
class Cell:
    """One number: mean, half width of its 95 % interval, n; mark is "best", "tie" or "" (also when nothing to compare).

    Args:
        value: the mean.
        half: the longer half of the interval.
        n: number of examples.
        mark: "best", "tie" or "".
        seeds: number of trainings, whose spread the interval has; 0 for a single one.
        ends: of the interval where it is not value ± half.
        covers: what the interval covers.
        over_domains: 95 % interval of an average that takes its sets as a sample of sets; None for fewer than five.
    """

    value: float
    half: float
    n: int
    mark: str = ""
    seeds: int = 0
    ends: tuple[float, float] | None = None
    covers: Covers = ""
    over_domains: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half if self.ends is None else self.ends[1]


@dataclass(frozen=True)
class Comparison:
    """Arms by name under one condition of one protocol on one set (or the average over sets, `data` = "average").

    row: what all arms have in common; its arm, value and interval are those of the first.
    difference: (second - first arm, low, high) on the same examples; None unless there are two arms, paired.
    paired: whether all marks come from paired differences.
    p: two-sided, of a difference of 0. covers: what the interval of the difference covers. over_domains: 95 % interval of the
    difference of an average that takes its sets as a sample of sets; None for fewer than five.
    """

    row: Result
    data: str
    cells: dict[str, Cell]
    difference: tuple[float, float, float] | None
    paired: bool
    p: float | None = None
    covers: Covers = ""
    over_domains: tuple[float, float] | None = None

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
    """Yield the mean over sets of each condition that two or more sets and all have, each set weighing the same."""
    sets = len({group[0].data for group in groups})
    for condition in dict.fromkeys(group[0].condition for group in groups):
        chosen = [group for group in groups if group[0].condition == condition]
        arms = [row.arm for row in chosen[0]]
        if sets > 1 and len(chosen) == sets and all([row.arm for row in group] == arms for group in chosen):
            yield _compare(AVERAGE, list(zip(*chosen, strict=True)), evidence)


def _compare(data: str, columns: Sequence[Sequence[Result]], evidence: Evidence) -> Comparison:
    """Return the comparison of arms under one condition. columns: the rows of each arm, one for each set."""
    values = [math.fsum(row.value for row in rows) / len(rows) for rows in columns]
    intervals = [evidence.interval(rows) for rows in columns]
    choose = min if columns[0][0].better == LOWER else max
    best = choose(range(len(values)), key=values.__getitem__)
    several = len(columns) > 1
    paired = several
    cells = {}
    for number, rows in enumerate(columns):
        low, high, covers = intervals[number]
        mark = "best" if several else ""
        if number != best:
            pair = evidence.difference(columns[best], rows)
            paired = paired and pair is not None
            overlap = low <= intervals[best][1] and intervals[best][0] <= high
            tied = overlap if pair is None else pair.bounds[0] <= 0 <= pair.bounds[1]
            mark = "tie" if tied else ""
        sample = over_domains([row.value for row in rows])
        cells[rows[0].arm] = Cell(
            values[number],
            max(values[number] - low, high - values[number]),
            sum(row.n for row in rows),
            mark,
            len(evidence.seeds(rows)),
            (low, high),
            covers,
            None if sample is None else sample.bounds,
        )
    difference = evidence.difference(columns[1], columns[0]) if len(columns) == 2 else None
    if difference is None:
        return Comparison(columns[0][0], data, cells, None, paired)
    steps = over_domains([a.value - b.value for a, b in zip(columns[1], columns[0], strict=True)])
    return Comparison(
        columns[0][0],
        data,
        cells,
        (difference.mean, *difference.bounds),
        paired,
        difference.p,
        difference.covers,
        None if steps is None else steps.bounds,
    )


def _aligned(a: Values | None, b: Values | None) -> tuple[list[float], list[float]] | None:
    """Return two arms' values of the same examples in one order; None where the examples differ."""
    if a is None or b is None or a.keys() != b.keys() or len(a) < 2:
        return None
    return list(a.values()), [b[key] for key in a]
