"""The answer of a report: which model to take, why, and how many examples would tell the other models apart.

The criteria are the first measure under its strongest attack, if there is one, and the first clean measure of each task. With K
models and C criteria, the k = C K (K - 1) / 2 paired differences have joint intervals: each at the level 0.95^(1/k) (Sidak
1967, doi:10.2307/2283989), so that all of them hold together with a probability of at least 95 %.

1. A model whose difference to the best model of a criterion excludes 0 is shown to be worse.
2. Of the other models, all models within one standard error of the best model in every criterion are equally good choices
  (Breiman et al. 1984). The model with the fewest trained parameters among them is taken, without known numbers of parameters
  the best one.
3. n' examples show a true difference d with a power of 80 %, if the differences of n examples have the mean's variance V:

       n' = n V (z(1 - a/2) + z(0.8))^2 / d^2 + u z(1 - a/2)^2 / 2        u: examples per independent unit

   The last term stands for Student's t. The variance of the training seeds does not fall with the number of examples. If it takes
   more than half of what d allows, more seeds are needed, and the examples get the other half.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

from vismt.report.comparison import AVERAGE, CONSTANT, Cell, Comparison
from vismt.report.tables import (
    bounds_text,
    cell_text,
    counts_text,
    kinds_text,
    number_text,
    scale_text,
    strongest_attack,
)
from vismt.uncertainty.intervals import LOWER, SHARE, Estimate

JOINT, POWER = 0.95, 0.8
_LEAST = 0.03  # smallest difference that is asked for: three points, or three per cent of the score
_MOST_EXAMPLES, _MOST_SEEDS = 1_000_000, 1_000  # larger numbers are not told apart
MOST_NAMES = 4


@dataclass(frozen=True)
class Conclusion:
    """The answer of a report.

    model: Model to take. text: Answer. basis: What the answer follows from.
    """

    model: str
    text: str
    basis: str


def key_comparisons(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the first measure of the first task under its strongest attack, then the clean scores of up to three tasks."""
    chosen = first_of_tasks(comparisons)[:3]
    column = [c for c in comparisons if chosen and (c.block, c.data) == (chosen[0].block, chosen[0].data)]
    strongest = strongest_attack(column)
    return [*(c for c in column if c.condition == strongest), *chosen]


def first_of_tasks(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the first score of each task: of its sets and their average the one with the most models, then the average."""
    firsts: dict[str, list[Comparison]] = {}
    for c in comparisons:
        of_task = firsts.setdefault(c.row.task, [c])
        if (c.block, c.condition) == (of_task[0].block, of_task[0].condition):
            of_task.append(c)
    return [max(of_task, key=lambda c: (len(c.cells), c.data == AVERAGE)) for of_task in firsts.values()]


def about(c: Comparison) -> str:
    """Return measure, task, set, protocol, condition and n of a comparison, and what its intervals cover."""
    row = c.row
    words = dict.fromkeys([scale_text(row.metric, row.scale), row.task, c.data, row.protocol, c.condition])
    return f"{', '.join(words)}; n = {counts_text([c])} {row.unit}; {kinds_text([c])}"


def by_score(c: Comparison, names: Iterable[str]) -> list[str]:
    """Return models in the order of their scores, the best model first."""
    sign = 1 if c.row.better == LOWER else -1
    return sorted(names, key=lambda name: sign * c.cells[name].value)


def conclude(comparisons: Sequence[Comparison], sizes: Mapping[str, float]) -> Conclusion:
    """Return the answer that follows from the key comparisons, of which there is one or more.

    sizes: Number of trained parameters by model, as far as it is known.
    """
    comparisons = [
        replace(c, cells={name: of for name, of in c.cells.items() if name != CONSTANT or len(c.cells) == 1})
        for c in comparisons
    ]
    criteria = key_comparisons(comparisons)
    first = criteria[0]
    shared = [name for name in first.cells if all(name in c.cells for c in criteria)]
    if len(shared) < 2:  # each task has models of its own
        criteria, shared = criteria[:1], list(first.cells)
    if len(shared) == 1:
        (model,) = shared
        score = f"{scale_text(first.row.metric, first.row.scale)} {cell_text(first.cells[model], first.row)}"
        several = len({name for c in comparisons for name in c.cells}) > 1
        start = "The models have no measure in common." if several else "There is one model."
        return Conclusion(model, f"{start} {model}: {score}.", "")
    pairs = len(criteria) * len(shared) * (len(shared) - 1) // 2
    ranked = [_Ranking(c, by_score(c, shared), JOINT ** (1 / pairs)) for c in criteria]
    good = [name for name in shared if not any(name in ranking.worse for ranking in ranked)]
    names = _names(criteria)
    evidence = [ranking.text(name) for ranking, name in zip(ranked, names, strict=True) if ranking.worse]
    alike = [name for ranking, name in zip(ranked, names, strict=True) if not ranking.worse]
    if alike:
        start = "No model is shown to be better than another in"
        if len(shared) == 2:
            start = f"{' and '.join(shared)} are not shown to differ in"
        evidence.append(f"{start} {' or in '.join(alike)}.")
    model, reason = _taken(good, ranked, sizes) if good else (ranked[0].best, "")
    more = _needed_text(model, good, ranked)
    take = f"Take {model}." if good else f"Take {model} for {names[0]}: no model is among the best in everything."
    basis = f"Differences are paired by example, with joint 95 % intervals of {pairs} differences (Šidák)."
    if " would show " in more:
        basis += f" That many {first.row.unit} have a power of 80 %."
    return Conclusion(model, " ".join(filter(None, [take, *evidence, reason, more])), basis)


def _names(criteria: Sequence[Comparison]) -> list[str]:
    """Return what each criterion measures, with the task and the condition if they differ."""
    tasks, conditions = {c.row.task for c in criteria}, {c.condition for c in criteria}
    names = []
    for c in criteria:
        name = c.row.metric.partition(" in ")[0]
        if len(conditions) > 1:
            name = f"{name} under {c.condition}" if c.row.kind == "attack" else f"{c.condition} {name}"
        names.append(f"{name} of {c.row.task}" if len(tasks) > 1 else name)
    return names


@dataclass(frozen=True)
class _Ranking:
    """The models under one criterion, the best model first.

    level: Level of the interval of each difference.
    """

    c: Comparison
    names: Sequence[str]
    level: float

    @property
    def best(self) -> str:
        """Model with the best score."""
        return self.names[0]

    @cached_property
    def worse(self) -> list[str]:
        """Models that are shown to be worse than the best model."""
        return [name for name in self.names[1:] if self._is_worse(name)]

    def _is_worse(self, name: str) -> bool:
        found = self.c.pair(self.best, name)
        if found is None:  # there are no records of the same examples, so these are two separate intervals
            one, other = self.c.cells[self.best], self.c.cells[name]
            return not (one.low <= other.high and other.low <= one.high)
        return abs(found.mean) > found.half_at(self.level)

    def is_near(self, name: str) -> bool:
        """Return whether a model is within one standard error of the best model."""
        found, (one, other) = self.c.pair(self.best, name), (self.c.cells[of] for of in (self.best, name))
        z = NormalDist().inv_cdf(0.975)
        error = math.hypot(one.high - one.low, other.high - other.low) / (2 * z)  # of the two separate intervals
        return abs(one.value - other.value) <= (error if found is None else math.sqrt(found.variance))

    def text(self, measure: str) -> str:
        """Return the sentence about the models that are shown to be worse."""
        best, *others = self.names
        if len(self.worse) < len(others):
            rest = _listed([name for name in others if name not in self.worse])
            return f"{_listed(self.worse)} shown to be worse than {best} in {measure}, {rest} not."
        than = others[0] if len(others) == 1 else "every other model"
        return f"{best} is shown to be better than {than} in {measure}{self._lead(others[0], len(others) > 1)}."

    def _lead(self, runner: str, named: bool) -> str:
        found = self.c.pair(self.best, runner)
        if found is None:
            return ""
        half = found.half_at(self.level)
        text = bounds_text(found.mean, found.mean - half, found.mean + half, self.c.row.scale, sign=True)
        return f": {text} {unit_of(self.c)}" + (f" against {runner}, the next" if named else "")


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMES:
        return f"{len(names)} models are"
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"


def unit_of(c: Comparison) -> str:
    """Return the unit of differences: "points" of a share, the metric's unit of a number."""
    return "points" if c.row.scale == SHARE else c.row.metric.partition(" in ")[2]


def _taken(good: Sequence[str], ranked: Sequence[_Ranking], sizes: Mapping[str, float]) -> tuple[str, str]:
    """Return the model to take among the models that are not shown to be worse, and the reason."""
    if len(good) == 1:
        return good[0], ""
    near = by_score(ranked[0].c, [name for name in good if all(ranking.is_near(name) for ranking in ranked)] or good)
    if not all(name in sizes for name in near):
        return near[0], f"{near[0]} has the best score, which may be chance."
    model = min(near, key=sizes.__getitem__)
    scores = "score" if len(ranked) == 1 else "score in each of these"
    size = f"{sizes[model]:,.0f} trained parameters" if sizes[model] else "nothing is trained"
    if len(near) == 1:
        return model, f"Only {model} lies within one standard error of the best {scores} ({size})."
    return model, f"{model} is the smallest model within one standard error of the best {scores} ({size})."


def _needed_text(model: str, good: Sequence[str], ranked: Sequence[_Ranking]) -> str:
    """Return how many examples would show the difference of the taken model to its rival. Return "" if that is not known."""
    ranking = ranked[0]
    c, rivals = ranking.c, [name for name in ranking.names if name in good and name != model]
    found = c.pair(model, rivals[0]) if rivals else None
    cell = c.cells[model]
    difference = max(abs(found.mean), _LEAST * (1 if c.row.scale == SHARE else abs(cell.value))) if found else 0.0
    if found is None or found.variance == 0 or difference == 0:
        return ""
    examples, trainings = needed(found, cell, difference, ranking.level)
    size = f"{number_text(difference, c.row.scale, half=difference).removesuffix('.0')} {unit_of(c)}".strip()
    between = f" between {model} and {rivals[0]}"
    if examples <= cell.n and trainings <= cell.seeds:
        return f"These {cell.n:,} {c.row.unit} would have shown a difference of {size}{between}."
    more = "at least " * (trainings == _MOST_SEEDS)
    seeds = f" and {more}{trainings:,} training seeds" if trainings > cell.seeds else ""
    seen = ", the one seen here" if difference == abs(found.mean) else ""
    count = f"{'About' if examples < _MOST_EXAMPLES else 'At least'} {float(f'{examples:.2g}'):,.0f} {c.row.unit}"
    return f"{count}{seeds} would show a difference of {size}{between}{seen}."


def needed(found: Estimate, cell: Cell, difference: float, level: float) -> tuple[int, int]:
    """Return the numbers of examples and training seeds that show a true difference with a power of 80 %.

    Numbers above a million examples, or above a thousand seeds, are cut off there.

    Args:
        found: Paired difference over the examples and seeds of `cell`.
        cell: Cell with n and seeds.
        difference: Difference of the scores, above 0.
        level: Level of the interval that has to exclude 0.
    """
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    allowed = max((difference / (quantile + NormalDist().inv_cdf(POWER))) ** 2, sys.float_info.min)
    (variance, freedom), *others = found.sources
    of_seeds = math.fsum(variance for variance, _ in others)
    trainings = cell.seeds
    if of_seeds > allowed / 2:
        trainings = math.ceil(min(2 * cell.seeds * of_seeds / allowed, _MOST_SEEDS))
        of_seeds = allowed / 2
    per_unit = cell.n / (freedom + 1) if math.isfinite(freedom) else 1.0
    examples = cell.n * variance / (allowed - of_seeds) + per_unit * quantile**2 / 2
    return math.ceil(min(examples, _MOST_EXAMPLES)), trainings
