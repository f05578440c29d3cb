"""Comparison of rows of results.jsonl: which arm is best, and which arms are statistical ties.

Two arms are compared on the same examples if both left records that reproduce their numbers. A tie then means that the interval
of the paired difference contains zero. Without such records, a tie means that the two intervals overlap. Differences without any
spread over two or more examples say nothing about other examples, and are ties too.

A report has one rule of correction. Its criteria are the scores of `key_comparisons`. With K_c models, criterion c has
k_c = K_c (K_c - 1) / 2 differences, k = sum_c k_c. Each difference between models has the level 0.95^(1/k) (Sidak
1967, doi:10.2307/2283989), so that all k intervals hold together with a probability of at least 95 %.

Rows of arms with several trainings have intervals over examples and seeds together (vismt.uncertainty.intervals.Estimate). So
have their differences and their averages over sets. Seeds are paired if two arms have the same seeds. A seed moves all sets
together, so the part of the seeds in the error of an average comes from the average over the sets for each seed. An average
takes its sets as a fixed list. For five or more sets, tables add the interval that takes them as a sample of sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from vismt.engine.study import FROZEN
from vismt.report.results import ROUNDING, Result
from vismt.uncertainty.intervals import (
    LOWER,
    UNSTATED,
    Covers,
    Estimate,
    Measure,
    average_of,
    group_index,
    interval_of,
    share_form,
    without_seeds_kind,
)

AVERAGE = "average"
CONSTANT = "constant"  # the best constant predictions, which come from no training
JOINT = 0.95  # probability that all intervals of the criteria of a report hold together
_MOST_TASKS = 3  # with criteria
MANY_CORRUPTIONS = 4  # from so many on, corruptions have a table of their own and a mean among the other conditions
_CORRUPTIONS = "corruptions"  # kind of this mean
Values = dict[str, float]


class ExampleValues(Protocol):
    """Values by example of rows. For one run this is `vismt.report.results.ValuesByExample`."""

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example. Return None if there are none."""

    def groups(self, result: Result) -> Mapping[str, str]:
        """Return the group of each example of a row. Return {} if its examples are independent."""


class Evidence:
    """The source of the intervals of rows without a seed: values by example, and the rows of the single trainings."""

    def __init__(self, results: Sequence[Result], values: ExampleValues) -> None:
        self._of, self._groups = cache(values.of), cache(values.groups)
        self._trainings: dict[tuple[object, ...], dict[int, Result]] = {}
        for row in results:
            if row.seed is not None:
                self._trainings.setdefault(replace(row, seed=None).key, {})[row.seed] = row

    def seeds(self, rows: Sequence[Result]) -> dict[int, float]:
        """Return the mean over some sets by training seed. Return {} for a single training."""
        by_set = [self._trainings.get(row.key, {}) for row in rows]
        shared = [seed for seed in by_set[0] if all(seed in trainings for trainings in by_set)]
        return {seed: math.fsum(trainings[seed].value for trainings in by_set) / len(by_set) for seed in shared}

    def interval(self, rows: Sequence[Result]) -> tuple[float, float, Covers]:
        """Return the 95 % interval of an arm's mean over sets, and what it covers."""
        if len(rows) == 1 and rows[0].kind != _CORRUPTIONS:
            return rows[0].low, rows[0].high, rows[0].interval
        found = self.estimate(rows)
        scale, n = rows[0].scale, sum(row.n for row in rows)
        form = share_form(scale, any(row.parts for row in rows), found.covers)
        return *interval_of(found, scale, n, form), found.covers

    def estimate(self, rows: Sequence[Result]) -> Estimate:
        """Return an arm's mean over sets with its errors. The error over the examples comes first."""
        return average_of([self._over_examples(row) for row in rows]).with_seeds(list(self.seeds(rows).values()))

    def _over_examples(self, row: Result) -> Estimate:
        """Return a row's score with its error over the examples alone."""
        covers = without_seeds_kind(row.interval)
        return Estimate(row.value, ((row.variance, row.freedom),), covers, row.bias)

    def difference(self, first: Sequence[Result], second: Sequence[Result]) -> Estimate | None:
        """Return the mean over sets of first - second on the same examples. Return None if a set has no such examples.

        The first error is over the examples, or over their groups. The second error is over the seeds. If both arms have the
        same seeds, it comes from the differences of trainings with the same seed, otherwise from both arms.
        """
        differences = []
        for a, b in zip(first, second, strict=True):
            left_of, right_of = self._of(a) or {}, self._of(b) or {}
            groups = self._groups(a)
            if left_of.keys() != right_of.keys() or len(left_of) < 2 or groups != self._groups(b):
                return None
            steps = {name: value - right_of[name] for name, value in left_of.items()}
            step = Measure(a.metric, steps, a.scale, covers=without_seeds_kind(a.interval), groups=groups)
            differences.append(step.estimate())
        left, right = self.seeds(first), self.seeds(second)
        if left.keys() == right.keys():
            return average_of(differences).with_seeds([left[seed] - right[seed] for seed in left])
        return average_of(differences).with_seeds(list(left.values()), list(right.values()))

    def unit_differences(self, first: Sequence[Result], second: Sequence[Result]) -> Tensor:
        """Return the share of each independent unit, an example or a group, in the mean over sets of first - second, (units,)."""
        shares = []
        for a, b in zip(first, second, strict=True):
            left, right, groups = self._of(a) or {}, self._of(b) or {}, self._groups(a)
            steps = (
                torch.tensor([left[name] - right[name] for name in left], dtype=torch.float64) / len(left) / len(first)
            )
            index = group_index([groups[name] for name in left] if groups else range(len(left)))
            shares.append(steps.new_zeros(int(index.max()) + 1).index_add_(0, index, steps))
        return torch.cat(shares)


@dataclass(frozen=True)
class Cell:
    """One number: mean, 95 % interval, n and mark. The mark is "best", "tie" or "" (also if there is nothing to compare).

    seeds: Number of trainings whose spread the interval has, 0 for a single training. covers: What the interval covers. units:
    Independent units of the examples, "379 signs", for one set whose examples are not independent. trained: Whether the arm was
    trained on the task.
    """

    value: float
    low: float
    high: float
    n: int
    mark: str = ""
    seeds: int = 0
    covers: Covers = "examples"
    units: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Comparison:
    """Arms by name under one condition of one protocol on one set (or the average over sets, `data` = "average").

    row: What all arms have in common. Its arm, value and interval belong to the first arm. base: Arm that differences are taken
    to, "" for none. differences: Differences arm - base on the same examples, by arm. Arms without records of them are left
    out. paired: Whether all marks come from paired differences. pair: Function that returns the difference of two arms, first -
    second on the same examples. None without records. shares: Function that returns the share of each independent unit in this
    difference (`Evidence.unit_differences`). level: Level of the interval of each difference between arms.
    """

    row: Result
    data: str
    cells: dict[str, Cell]
    base: str
    differences: dict[str, Estimate]
    paired: bool
    pair: Callable[[str, str], Estimate | None] = field(default=lambda *_: None, repr=False, compare=False)
    shares: Callable[[str, str], Tensor] = field(default=lambda *_: torch.empty(0), repr=False, compare=False)
    level: float = JOINT

    @property
    def condition(self) -> str:
        """Text of the condition."""
        return self.row.condition

    @property
    def block(self) -> tuple[str, str, str, str]:
        """Task, protocol, metric and unit, which all numbers of one table share."""
        return block_key(self.row)

    @property
    def models(self) -> list[str]:
        """Arms that were trained on the task, best first. The constant answer is left out, unless it is alone."""
        trained = [name for name, cell in self.cells.items() if cell.trained]
        return by_score(self, [name for name in trained if not is_constant(name)] or trained or self.cells)

    @property
    def constants(self) -> list[str]:
        """Arms that are constant answers, best first."""
        return by_score(self, filter(is_constant, self.cells))

    def tells(self, first: str, second: str) -> bool:
        """Return whether two arms are shown to differ. Scores without any spread show nothing."""
        found, one, other = self.pair(first, second), self.cells[first], self.cells[second]
        step = abs(one.value - other.value)
        if found is None:  # there are no records of the same examples, so these are two separate intervals
            spread = one.high - one.low + other.high - other.low
            return (one.low > other.high or other.low > one.high) and spread > ROUNDING * step
        return abs(found.mean) > found.half_at(self.level) > ROUNDING * step


def is_constant(arm: str) -> bool:
    """Return whether an arm is the constant answer of a run. A comparison of runs names it "RUN: constant"."""
    return arm.rpartition(": ")[2] == CONSTANT


def by_score(c: Comparison, names: Iterable[str]) -> list[str]:
    """Return models in the order of their scores, the best model first."""
    sign = 1 if c.row.better == LOWER else -1
    return sorted(names, key=lambda name: sign * c.cells[name].value)


def first_of_tasks(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the first score of each task in each protocol, such as each number of shots.

    Of several sets it is their average if it has every model, otherwise each set that compares models.
    """
    firsts: dict[str, Comparison] = {}
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in comparisons:
        first = firsts.setdefault(c.row.task, c)
        if (c.row.metric, c.row.unit, c.condition) == (first.row.metric, first.row.unit, first.condition):
            groups.setdefault((c.row.task, c.row.protocol), []).append(c)
    found: list[Comparison] = []
    for group in groups.values():
        most = max(group, key=lambda c: (len(c.models), c.data == AVERAGE))
        whole = most.data == AVERAGE and {*most.models} == {name for c in group for name in c.models}
        several = [c for c in group if c.data != AVERAGE and len(c.models) > 1]
        found += [most] if whole or not several else several
    return found


def key_comparisons(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the criteria of a report: the first scores of up to three tasks, and of the first task the strongest attack too.

    A score of one model is no criterion beside scores that compare models, nor is one without a better side beside others. The
    level of each holds for all of them together.
    """
    chosen = first_of_tasks([c for c in comparisons if c.row.better != UNSTATED] or comparisons)
    tasks = list(dict.fromkeys(c.row.task for c in chosen))[:_MOST_TASKS]
    found: list[Comparison] = []
    for first in (c for c in chosen if c.row.task in tasks):
        found.append(first)
        column = [c for c in comparisons if (c.block, c.data) == (first.block, first.data) and c is not first]
        strongest = strongest_attack(column)
        found += [c for c in column if c.condition == strongest and first.row.task == tasks[0]]
    found = [c for c in found if len(c.models) > 1] or found
    level = JOINT ** (1 / max(1, count_differences(found)))
    return [replace(c, level=level) for c in found]


def count_differences(criteria: Sequence[Comparison]) -> int:
    """Return the number of differences of two models in some criteria."""
    return sum(math.comb(len(c.models), 2) for c in criteria)


def strongest_attack(comparisons: Sequence[Comparison]) -> str:
    """Return the attack that leaves the best arm the least, by the first measure it has a row of. Return "" without an attack.

    If several break everything, it is the last, because the worst case over the other attacks follows them.
    """
    attacks = [c for c in comparisons if c.row.kind == "attack"]
    column = [c for c in attacks if (c.block, c.data) == (attacks[0].block, attacks[0].data)]
    sign = -1 if column and column[0].row.better == LOWER else 1
    left = {c.condition: max(sign * c.cells[name].value for name in c.models) for c in reversed(column)}
    return min(left, key=left.__getitem__, default="")


def arm_title(arm: str, conditions: Iterable[str]) -> str:
    """Return the name of an arm in reports: "clean model" for an arm with the name of a condition."""
    return f"{arm} model" if arm in conditions else arm


def block_key(row: Result) -> tuple[str, str, str, str]:
    """Return task, protocol, metric and unit of a row."""
    return (row.task, row.protocol, row.metric, row.unit)


def compare_results(
    results: Sequence[Result],
    values: ExampleValues,
    baselines: Mapping[str, str] | None = None,
    references: Sequence[str] = (FROZEN, CONSTANT),
) -> list[Comparison]:
    """Return one comparison for each block, set and condition, by block, then sets, then conditions in the order of the results.

    Rows of single trainings (with a seed) are left out. values: Values by example of a row. baselines: Arm that differences are
    taken to, by task, "" for none. For other tasks it is the first arm that is not among `references`, the arms that come from
    no training. For a single such arm it is the first reference.
    """
    results, values = _with_corruption_means(results, values)
    rows = [row for row in results if row.seed is None]
    blocks = list(dict.fromkeys(block_key(row) for row in rows))
    sets = list(dict.fromkeys(row.data for row in rows))
    conditions = list(dict.fromkeys(row.condition for row in rows))

    def order(row: Result) -> tuple[int, int, bool, int]:
        return (
            blocks.index(block_key(row)),
            sets.index(row.data),
            row.condition != "clean",
            conditions.index(row.condition),
        )

    def pairs(group: Sequence[Result], arms: Sequence[str]) -> tuple[str, list[str]]:
        """Return the baseline among the arms of a block, and the arms that it is compared with in one group of rows."""
        trained = [arm for arm in arms if arm not in references] or arms
        base = (baselines or {}).get(group[0].task, trained[0] if len(trained) > 1 else arms[0])
        present = {row.arm for row in group}
        return base, [arm for arm in trained if arm != base and {arm, base} <= present]

    evidence = Evidence(results, values)
    comparisons: list[Comparison] = []
    for _, table in groupby(sorted(rows, key=order), key=block_key):
        by_place = groupby(table, key=lambda row: (row.data, row.condition))
        groups = [sorted(group, key=lambda row: row.arm != FROZEN) for _, group in by_place]
        columns: list[tuple[str, Sequence[Result], Sequence[Sequence[Result]]]]
        columns = [(group[0].data, group, [[row] for row in group]) for group in groups]
        if all(group[0].data != AVERAGE for group in groups):
            columns += [(AVERAGE, group, rows) for group, rows in _averages(groups)]
        arms = list(dict.fromkeys(row.arm for group in groups for row in group))
        found = [_compare(data, rows, *pairs(group, arms), evidence) for data, group, rows in columns]
        comparisons += [_with_shown_names(c, conditions) for c in found]
    levels = [c.level for c in key_comparisons(comparisons)]
    return [_marked(replace(c, level=levels[0])) for c in comparisons]


def _marked(c: Comparison) -> Comparison:
    """Return a comparison with the best arm and its ties marked. A tie is an arm that is not told from the best."""
    best, *others = by_score(c, c.cells)
    # If a value is outside its own interval, which is corrected for a bias, nobody can say that it is the best.
    if not others or c.row.better == UNSTATED or not c.cells[best].low <= c.cells[best].value <= c.cells[best].high:
        return c
    marks = {best: "best", **{name: "" if c.tells(best, name) else "tie" for name in others}}
    return replace(c, cells={name: replace(cell, mark=marks[name]) for name, cell in c.cells.items()})


def _with_shown_names(c: Comparison, conditions: Sequence[str]) -> Comparison:
    arms = {arm_title(arm, conditions): arm for arm in c.cells}
    return replace(
        c,
        cells={name: c.cells[arm] for name, arm in arms.items()},
        base=arm_title(c.base, conditions),
        differences={arm_title(arm, conditions): value for arm, value in c.differences.items()},
        pair=lambda first, second: c.pair(arms[first], arms[second]),
        shares=lambda first, second: c.shares(arms[first], arms[second]),
    )


def _with_corruption_means(results: Sequence[Result], values: ExampleValues) -> tuple[list[Result], ExampleValues]:
    """Return the rows with the mean of each arm over many corruptions, example by example, and the values of all rows."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for row in results:
        if row.kind == "corruption":
            groups.setdefault((*block_key(row), row.data, row.arm, row.seed), []).append(row)
    parts: dict[tuple[object, ...], list[Result]] = {}
    means, joined = [], _WithMeans(values, parts)
    for rows in groups.values():
        if len(rows) >= MANY_CORRUPTIONS:
            condition = f"mean of {len(rows)} corruptions"
            row = replace(rows[0], condition=condition, kind=_CORRUPTIONS, family=_CORRUPTIONS, level=None)
            parts[row.key] = rows
            # Without values by example the mean has the mean variance of its rows, which is the largest variance
            # that it can have.
            columns = zip(*((one.value, one.low, one.high, one.variance, *one.bias) for one in rows), strict=True)
            value, low, high, error, most, least = (math.fsum(column) / len(rows) for column in columns)
            freedom, by_example = min(one.freedom for one in rows), joined.of(row)
            if by_example is not None and len(by_example) > 1:
                measure = Measure(row.metric, by_example, row.scale, groups=joined.groups(row))
                ((error, freedom),) = measure.estimate().sources
            found = replace(row, value=value, low=low, high=high, variance=error, freedom=freedom, bias=(most, least))
            means.append(found)
    return [*results, *means], joined


@dataclass(frozen=True)
class _WithMeans:
    """Values by example of rows, and of the means of some of them.

    parts: Rows of each mean by its key.
    """

    values: ExampleValues
    parts: Mapping[tuple[object, ...], Sequence[Result]]

    def of(self, result: Result) -> Values | None:
        found = [self.values.of(row) for row in self.parts.get(result.key, [result])]
        columns = [column for column in found if column is not None and column.keys() == (found[0] or {}).keys()]
        if len(columns) < len(found):
            return None
        return {name: math.fsum(column[name] for column in columns) / len(columns) for name in columns[0]}

    def groups(self, result: Result) -> Mapping[str, str]:
        return self.values.groups(self.parts.get(result.key, [result])[0])


def _averages(groups: Sequence[Sequence[Result]]) -> Iterable[tuple[Sequence[Result], list[Sequence[Result]]]]:
    """Yield, for each condition that two or more sets have, the rows of one set and the rows of each arm in all sets.

    Every set has the same weight in their mean. Arms that were not trained on all sets are left out.
    """
    sets = len({group[0].data for group in groups})
    for condition in dict.fromkeys(group[0].condition for group in groups):
        of_sets = [group for group in groups if group[0].condition == condition]
        out = {row.arm for group in of_sets for row in group if row.untrained}
        chosen = [[row for row in group if row.arm not in out] for group in of_sets]
        arms = [row.arm for row in chosen[0]]
        alike = len(chosen) == sets and all([row.arm for row in group] == arms for group in chosen)
        if sets > 1 and alike and not all(map(is_constant, arms)):
            yield chosen[0], list(zip(*chosen, strict=True))


def _compare(
    data: str, columns: Sequence[Sequence[Result]], base: str, compared: Sequence[str], evidence: Evidence
) -> Comparison:
    """Return the comparison of arms under one condition, with the differences of the compared arms to the baseline.

    columns: Rows of each arm, one for each set.
    """
    by_arm = {rows[0].arm: rows for rows in columns}

    @cache
    def pair(first: str, second: str) -> Estimate | None:
        return evidence.difference(by_arm[first], by_arm[second])

    cells = {}
    for arm, rows in by_arm.items():
        value = math.fsum(row.value for row in rows) / len(rows)
        n, seeds = sum(row.n for row in rows), len(evidence.seeds(rows))
        units = rows[0].units if len(rows) == 1 else ""
        low, high, covers = evidence.interval(rows)
        cells[arm] = Cell(value, low, high, n, "", seeds, covers, units, not any(row.untrained for row in rows))
    differences = {arm: found for arm in compared if (found := pair(arm, base)) is not None}

    def shares(first: str, second: str) -> Tensor:
        return evidence.unit_differences(by_arm[first], by_arm[second])

    c = Comparison(columns[0][0], data, cells, base, differences, False, pair, shares)
    best, *others = by_score(c, cells)
    return replace(c, paired=bool(others) and all(pair(best, name) is not None for name in others))
