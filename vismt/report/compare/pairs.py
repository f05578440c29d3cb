"""Paired differences of models on the same examples, of runs of vismt and of tables that another program wrote.

The mean difference has the interval of `vismt.report.comparison.Evidence.difference`, over the examples or their groups, and
over the training seeds if there are several. For one training of each model, p comes from sign flips of the units. For several
trainings it comes from the interval, because sign flips of examples leave the seeds out. Holm's method corrects p over the
pairs of one set and metric.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import TypeVar

import torch

from vismt.base.errors import UserError
from vismt.report.compare.score_tables import Say, TrainingValues
from vismt.report.comparison import Comparison, Values, is_constant
from vismt.report.results import Result, result_of
from vismt.report.tables import interval_text, number_text, without_further
from vismt.storage.files import JsonObject
from vismt.uncertainty.intervals import (
    CLEAN,
    HIGHER,
    LOWER,
    NUMBER,
    SHARE,
    UNSTATED,
    Better,
    Measure,
    Scale,
    Score,
    averaged,
    holm,
    sign_flip_p,
)
from vismt.uncertainty.probability_metrics import binned_gaps, gap_values

T = TypeVar("T", str, float)
_UNNAMED = "all"  # name of a set that no input names
# Words of a metric's name that say which values are better.
_LOWER = re.compile(
    r"\b(loss(es)?|errors?|err|nll|brier|ece|mce|ppl|perplexity|bits|rmse|rmsle|mae|mse|mape|hd|wer|cer|ter|eer|fid|kid|lpips|dists|"
    r"fpr|fnr|far|frr|e?aurc|regret|latency|runtime|toxicity|hallucinations?|distance|divergence|(abs|sq) ?rel|epe|hausdorff)\b"
)
_HIGHER = re.compile(
    r"\b(accuracy|acc|correct|exact|em|f|dice|m?iou|jaccard|precision|recall|sensitivity|specificity|tpr|tnr|auc|auroc|auprc|ap|map|"
    r"ndcg|mrr|hits?|hr|bleu|chrf|rouge|meteor|bertscore|comet|psnr|ssim|mcc|kappa|pearson|spearman|correlation|pass)\b"
)


@dataclass(frozen=True)
class PairedDifference:
    """The difference b - a of two models on the same examples of one set, by one metric.

    Args:
        a: Name of the first model, the baseline if there is one.
        b: Name of the second model.
        set: Name of the set, "average" for the mean over all sets.
        metric: Name of the metric.
        difference: Mean of b - a, in the unit of the metric.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        n: Number of examples.
        groups: Number of independent groups of examples, None if the examples are independent.
        seeds: Number of trainings of each model.
        detectable: Smallest true difference that this comparison finds with a probability of 80 %.
        p: Two-sided p of no difference.
        p_holm: p, corrected for the number of pairs.
        better: "higher" or "lower" values of the metric, "unstated" if nobody said it.
        scale: "share" if every value says right or wrong, so that texts show points of a hundred.
    """

    a: str
    b: str
    set: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    groups: int | None
    seeds: int
    detectable: float
    p: float
    p_holm: float
    better: Better
    scale: Scale

    def as_json(self) -> JsonObject:
        """Return the fields that `vismt compare --json` prints."""
        return {name: value for name, value in asdict(self).items() if name not in ("better", "scale")}

    def __str__(self) -> str:
        points = " points" if self.scale == SHARE else ""
        least = number_text(self.detectable, self.scale)
        if self.low <= 0 <= self.high:
            shown = interval_text(self.difference, self.low, self.high, self.scale, sign=True)
            verdict = f"{self.b} and {self.a} do not differ measurably, {shown}{points}"
        else:
            gains = (self.difference > 0) == (self.better != LOWER)
            best, other = (self.b, self.a) if gains else (self.a, self.b)
            low, high = sorted((abs(self.low), abs(self.high)))
            size = interval_text(abs(self.difference), low, high, self.scale)
            lead = f"has a higher {self.metric}" if self.better == UNSTATED else "is better"
            verdict = f"{best} {lead} than {other} by {size}{points}"
        units = f" in {self.groups:,} groups" if self.groups else ""
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{verdict} (n = {self.n:,}{units}{seeds}); a difference under {least}{points} cannot be seen here"


def paired_differences(comparisons: Sequence[Comparison], baseline: str | None = None) -> list[PairedDifference]:
    """Return the difference of each pair of models that have the same examples.

    Args:
        comparisons: Comparisons of the models, by metric, condition and set.
        baseline: Model that all others are compared with. None for all pairs.
    """
    several = len({c.row.protocol for c in comparisons}) > 1
    found = []
    for c in without_further(comparisons):
        # Runs have rows of several protocols and conditions.
        words = [c.row.metric, *[c.row.protocol] * several, *[c.condition] * (c.condition != CLEAN.label)]
        names = [name for name in c.cells if not is_constant(name)]
        named = [(baseline, name) for name in names if name != baseline] if baseline in names else []
        pairs = [
            _compared(c, ", ".join(words), a, b) for a, b in (combinations(names, 2) if baseline is None else named)
        ]
        kept = [pair for pair in pairs if pair is not None]
        found += [replace(pair, p_holm=p) for pair, p in zip(kept, holm([pair.p for pair in kept]), strict=True)]
    return found


def _compared(c: Comparison, metric: str, a: str, b: str) -> PairedDifference | None:
    """Return the difference of two models. Return None if their examples differ."""
    difference = c.pair(b, a)
    if difference is None:
        return None
    shares = c.shares(b, a)
    p = difference.p_value if "seeds" in difference.covers else sign_flip_p(shares)
    n, seeds = c.cells[a].n, max(1, min(c.cells[name].seeds for name in (a, b)))
    groups = len(shares) if len(shares) < n else None
    found = (difference.mean, *difference.bounds, n, groups, seeds, difference.detectable(), p, p)
    return PairedDifference(a, b, c.data, metric, *found, c.row.better, c.row.scale)


class GivenScores:
    """Rows and values by example of tables that another program wrote, in the form of a run's rows."""

    def __init__(self, trainings: Sequence[TrainingValues]) -> None:
        """trainings: Trainings with the same examples for each set, as `match` returns them."""
        self.results: list[Result] = []
        self._measures: dict[tuple[object, ...], Measure] = {}
        seeds = {name: number for number, name in enumerate(sorted({one.seed for one in trainings}))}
        by_place: dict[tuple[str, str, str], dict[int, Measure]] = {}
        for training in trainings:
            for measure in _measures(training):
                place = (training.data, training.model, measure.metric)
                by_place.setdefault(place, {})[seeds[training.seed]] = measure
        plain = {metric: True for _, _, metric in by_place}
        for (_, _, metric), measures in by_place.items():
            values = (value for one in measures.values() for value in one.values.values())
            plain[metric] = plain[metric] and all(value in (0.0, 1.0) for value in values)
        for (data, model, metric), measures in by_place.items():
            if plain[metric]:
                measures = {seed: replace(one, scale=SHARE, counts=True) for seed, one in measures.items()}
            self._add(averaged(list(measures.values())), data, model, None)
            if len(measures) > 1:
                for seed, measure in measures.items():
                    self._add(measure, data, model, seed)

    def _add(self, measure: Measure, data: str, model: str, seed: int | None) -> None:
        score = Score("comparison", data, "same examples", measure, CLEAN, "examples")
        row = result_of(score, model, seed, "test", "")
        self._measures[row.key] = measure
        self.results.append(row)

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example. Return None for a metric that is not a mean over the examples."""
        measure = self._measures[result.key]
        return dict(measure.values) if measure.paired else None

    def groups(self, result: Result) -> Mapping[str, str]:
        """Return the group of each example. Return {} if the examples are independent."""
        return self._measures[result.key].groups


def direction(metric: str) -> Better:
    """Return which values of a metric are better by the words of its name, "unstated" if they say nothing or both."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", metric)  # mErr, beside mIoU
    words = re.sub(r"[^a-z]+", " ", f"{apart} | {metric}".casefold())
    lower, higher = bool(_LOWER.search(words)), bool(_HIGHER.search(words))
    return UNSTATED if lower == higher else LOWER if lower else HIGHER


def _measures(training: TrainingValues) -> Iterable[Measure]:
    """Yield the measures of one training."""
    groups = dict(zip(training.ids, training.groups, strict=True)) if training.groups else {}
    for metric, values in training.values.items():
        better = training.better.get(metric) or direction(metric)
        by_id = dict(zip(training.ids, values, strict=True))
        yield Measure(metric, by_id, NUMBER, better, groups=groups, grouped_by="groups")
    if training.confidences:
        confidences, correct = (
            torch.tensor(column, dtype=torch.float64) for column in (training.confidences, training.values["accuracy"])
        )
        effects, error = gap_values(binned_gaps(confidences, correct), training.groups or None)
        by_id = dict(zip(training.ids, effects.tolist(), strict=True))
        yield Measure("ECE-15", by_id, SHARE, LOWER, error=error, paired=False, groups=groups, grouped_by="groups")


def match(trainings: Sequence[TrainingValues], common: bool, say: Say) -> list[TrainingValues]:
    """Return the trainings with the same examples in the same order, for each set.

    Args:
        trainings: Trainings of all models.
        common: Whether to keep the examples and seeds that all models have. Otherwise a difference is an error.
        say: Function that takes a sentence about what was left out.

    Raises:
        UserError: If some models lack examples or seeds, an example comes twice or has two labels or groups, or fewer than two
            examples are common.
    """
    named = {one.data for one in trainings} - {""}
    if len(named) > 1 and any(not one.data for one in trainings):
        where = next(one.where for one in trainings if not one.data)
        raise UserError(
            f"compare: '{where}' does not say the set of its rows, and other inputs have {len(named)}; name it by --set."
        )
    for one in trainings:
        one.data = one.data or next(iter(named), _UNNAMED)
    found = []
    for data in dict.fromkeys(one.data for one in trainings):
        found += _matched([one for one in trainings if one.data == data], data, common, say)
    return found


def _matched(trainings: Sequence[TrainingValues], data: str, common: bool, say: Say) -> list[TrainingValues]:
    """Return the trainings of one set with the same examples."""
    trainings, faults = _with_shared_seeds(trainings, data)
    places: list[dict[str, int]] = []  # row of each example
    repeated, other = set(), set()
    truths: dict[str, str] = {}
    for one in trainings:
        place: dict[str, int] = {}
        repeated |= {name for row, name in enumerate(one.ids) if place.setdefault(name, row) != row}
        other |= {name for name, text in zip(one.ids, one.truths) if truths.setdefault(name, text) != text}
        places.append(place)
    shared = set.intersection(*map(set, places))
    for names, what in (
        (repeated, "come twice in one training"),
        (set.union(*map(set, places)) - shared, "are not in every input"),
        (other & shared, "have another label or document in another input"),
    ):
        if names:
            faults.append(f"{len(names):,} examples (first '{min(names)}') {what}")
    alike = shared - repeated - other
    kept = [name for name in places[0] if name in alike]
    if faults:
        text = f"set '{data}': {'; '.join(faults)}; {len(kept):,} examples are the same in all inputs"
        if not common or len(kept) < 2:
            raise UserError(f"compare: {text}{'. --common compares only these examples' * (len(kept) > 1)}.")
        say(f"{text} and are compared")
    return _with_groups(trainings, [[place[name] for name in kept] for place in places], data)


def _with_shared_seeds(trainings: Sequence[TrainingValues], data: str) -> tuple[list[TrainingValues], list[str]]:
    """Return the trainings whose seed every model has, and what to say about the others."""
    seeds: dict[str, set[str]] = {}
    for one in trainings:
        seeds.setdefault(one.model, set()).add(one.seed)
    shared = set.intersection(*seeds.values())
    if all(of == shared for of in seeds.values()):
        return list(trainings), []
    listed = "; ".join(
        f"'{model}' has the seeds {', '.join(sorted(of)) if any(of) else 'none'}" for model, of in seeds.items()
    )
    if not shared:
        raise UserError(f"compare: set '{data}': {listed}; no seed is in all of them.")
    return [one for one in trainings if one.seed in shared], [listed]


def _with_groups(trainings: Sequence[TrainingValues], rows: Sequence[list[int]], data: str) -> list[TrainingValues]:
    """Return the chosen rows of each training, with the groups that any input names."""

    def taken(column: list[T], places: list[int]) -> list[T]:
        return [column[row] for row in places] if column else []

    chosen = [
        replace(
            one,
            ids=taken(one.ids, places),
            values={metric: taken(column, places) for metric, column in one.values.items()},
            confidences=taken(one.confidences, places),
            groups=taken(one.groups, places),
        )
        for one, places in zip(trainings, rows, strict=True)
    ]
    group_of: dict[str, str] = {}
    for one in chosen:
        if len(one.ids) < 2:
            raise UserError(f"compare: set '{data}' has {len(one.ids)} example; an interval needs two or more.")
        for name, group in zip(one.ids, one.groups, strict=False):
            if group_of.setdefault(name, group) != group:
                raise UserError(f"compare: set '{data}': '{name}' is in group '{group_of[name]}' and in '{group}'.")
    if group_of and len(set(group_of.values())) < 2:
        raise UserError(f"compare: set '{data}' has one group; an interval needs two or more.")
    return [replace(one, groups=[group_of[name] for name in one.ids] if group_of else []) for one in chosen]
