"""How well a pool's experts can be chosen: its rules beside the best expert on validation, and what a choice by task is worth.

The latter is estimated from split halves of each task's queries, and so is the spread of the tasks' true differences
(vismt/uncertainty/split_halves.py); both follow from the records, without a model. Where episodes lie in parts that share no
image, all values are means by part. Several training seeds are averaged, and their spread is in the intervals. What the choice
gains is also a score of the run, GAIN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.jobs.fewshot.arms import evaluated_experts, split_head
from vismt.jobs.fewshot.config import DEFAULT, EXPERT, MERGED, FewShotConfig
from vismt.jobs.fewshot.evaluation import episodes_file
from vismt.jobs.fewshot.merge_settings import VALIDATION
from vismt.metatune.protocol.episode_outcome import right_field
from vismt.report.comparison import AVERAGE, MANY_CORRUPTIONS
from vismt.report.results import Result, Score
from vismt.report.tables import Table, bounds_text, interval_text, number_text
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import (
    NUMBER,
    SHARE,
    average_of,
    estimate,
    group_index,
    interval_kind_text,
    weakest_kind,
)
from vismt.uncertainty.split_halves import DIVISIONS, FOLDS, ChoiceValues, choice

GAIN = "gain of a choice by task in points"
VALIDATED = "best expert on validation"
FIXED = "best expert of the other tasks"
HALVES = "best expert of each task"
RULES_NOTE = (
    f"“{FIXED}” is the expert that is best on average over all tasks except the scored one. “{HALVES}” is the expert with the "
    f"best answers to half of a task's queries, scored on the other half; mean of {DIVISIONS} random halvings. “average” and "
    "“merged:average” average all experts. Differences to “merged” are paired by episode."
)
WORTH_NOTE = (
    f"The score “{GAIN}” of “{MERGED}” is “{HALVES}” minus “{FIXED}”. Where its interval contains 0, the labels of half of "
    "the queries do not show that choosing by task helps. Bracket of the accuracy of each task's truly best expert: an expert "
    f"that is chosen by {FOLDS - 1} of {FOLDS} parts of the queries lies below it, one that is chosen by the scored queries "
    "above it. The spread is the standard deviation over tasks of the true difference of two experts (root mean square over "
    "the pairs), without the noise of the queries; it includes the chance in the support images. It is not resolved where the "
    "interval of its square contains 0."
)
SHOWN = {"fixed": FIXED, "halves": HALVES}  # fields of `ChoiceValues` that stand beside the models
# Accuracies (g,) by episode or part, or (seeds, g), by model; and the fields of `ChoiceValues`.
Values = dict[str, Tensor]
Case = tuple[str, str]  # condition and set


def choice_tables(
    folder: Path, config: FewShotConfig, seeds: Sequence[int], results: Sequence[Result]
) -> list[tuple[Table, str]]:
    """Return two tables for each protocol; [] unless "merged" and two experts or more are evaluated."""
    rows = [row for row in results if row.seed is None and row.metric == "accuracy"]
    arms = list(dict.fromkeys(row.arm for row in rows))
    experts = [f"{EXPERT}{label}" for label in evaluated_experts(config)]
    if MERGED not in arms or len(experts) < 2:
        return []
    rules = [arm for arm in arms if arm.startswith(f"{MERGED}:") and not split_head(arm)[1]]
    models = [arm for arm in arms if arm in (DEFAULT, AVERAGE, "min_ce", "logits") or arm in rules]
    tables = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        merged = [row for row in rows if row.arm == MERGED and row.protocol == protocol]
        if len({row.condition for row in merged if row.kind == "corruption"}) >= MANY_CORRUPTIONS:
            merged = [row for row in merged if row.kind != "corruption"]
        cases: dict[Case, Values] = {}
        counts: dict[Case, int] = {}
        for row in merged:
            by_seed = [_of_seed(folder, config, seed, row, [MERGED, *models], experts) for seed in seeds]
            if all(by_seed):
                common = [name for name in by_seed[0] if all(name in values for values in by_seed)]
                stacked = {name: torch.stack([values[name] for values in by_seed]) for name in common}
                cases[row.condition, row.data], counts[row.condition, row.data] = stacked, row.n
        if cases:
            covers = interval_kind_text(weakest_kind([row.interval for row in merged]))
            tables.append((_rules(protocol, cases, counts), f"{RULES_NOTE} Intervals: {covers}."))
        if cases and all("variance" in values for values in cases.values()):
            tables.append((_worth(protocol, cases, counts), WORTH_NOTE))
    return tables


def _of_seed(
    folder: Path, config: FewShotConfig, seed: int, row: Result, models: Sequence[str], experts: Sequence[str]
) -> Values:
    case = (row.data, row.protocol, row.condition)
    path = folder / "pool" / f"seed-{seed}" / VALIDATION
    validated = read_sealed(path, f"run '{folder}'") if path.exists() else {}
    share = config.select.class_share if config.select is not None else 0.0
    judged: dict[str, float] = validated.get(row.data if share else "all", {})
    sources = {arm: arm for arm in models}
    if judged:
        sources[VALIDATED] = EXPERT + max(judged, key=judged.__getitem__)
    groups = torch.arange(row.n) % (row.parts or row.n)
    shown = {}
    for name, arm in sources.items():
        _, found = _episodes(folder, seed, *case, arm)
        if len(found) != row.n:
            return {}
        values = torch.tensor([line[row.condition] for line in found], dtype=torch.float64)
        shown[name] = torch.stack([values[groups == group].mean() for group in groups.unique()])
    chosen = _choice(folder, seed, *case, experts, groups)
    return shown if chosen is None else shown | vars(chosen)


def choice_gains(
    folder: Path, config: FewShotConfig, seeds: Sequence[int], scores: Mapping[str, Sequence[Score]]
) -> dict[str, list[Score]]:
    """Return GAIN, `ChoiceValues.halves` - fixed, for each accuracy of "merged"; {} unless it and two experts were scored.

    seeds: the trainings whose mean the scores are.
    """
    experts = [f"{EXPERT}{label}" for label in evaluated_experts(config)]
    accuracies = [score for score in scores.get(MERGED, ()) if score.measure.metric == "accuracy" and len(experts) > 1]
    gains = []
    for score in accuracies:
        measure = score.measure
        groups = group_index([measure.groups.get(name, name) for name in measure.values])
        case = (score.data, score.protocol, score.condition.label)
        chosen = [_choice(folder, seed, *case, experts, groups) for seed in seeds]
        by_group = [100 * (of.halves - of.fixed) for of in chosen if of is not None]
        if len(by_group) == len(seeds):
            values = torch.stack(by_group).mean(0)[groups].tolist()
            gain = dict(zip(measure.values, values, strict=True))
            gains.append(replace(score, measure=replace(measure, metric=GAIN, values=gain, scale=NUMBER, chance=None)))
    return {MERGED: gains} if gains else {}


def _episodes(
    folder: Path, seed: int, data: str, protocol: str, condition: str, arm: str
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Return the header of a model's records and the lines that have a condition, in the order of the episodes."""
    header, *lines = read_lines(episodes_file(folder, seed, data, protocol, arm)) or [{}]
    found = {line["episode"]: line for line in lines if {"episode", condition} <= set(line)}
    return header, [found[number] for number in sorted(found)]


def _choice(
    folder: Path, seed: int, data: str, protocol: str, condition: str, experts: Sequence[str], groups: Tensor
) -> ChoiceValues | None:
    """Return what a choice by task is worth; None for too few tasks and records that lack an episode or the answers.

    The queries of each class follow each other in the answers; where episodes differ in their number, they are divided as if of
    one class.
    """
    queries, texts = 0, []
    for arm in experts:
        header, lines = _episodes(folder, seed, data, protocol, condition, arm)
        texts.append([line.get(right_field(condition)) or "" for line in lines])
        queries = header.get("settings", {}).get("sampler", {}).get("queries", 0)
    complete = all(len(of_expert) == len(groups) and min(map(len, of_expert)) > 1 for of_expert in texts)
    if not complete or len(groups.unique()) < 3:
        return None
    most = max(map(len, texts[0]))
    right = torch.tensor([[[bit == "1" for bit in text.ljust(most, "0")] for text in of_expert] for of_expert in texts])
    place = torch.arange(most)
    lengths = torch.tensor([len(text) for text in texts[0]])[:, None]
    labels = torch.where(place < lengths, place // queries if queries else 0, -1)
    return choice(right, labels, groups)


def _interval(by_set: Sequence[Tensor]) -> tuple[float, float]:
    """Return (mean over sets, half width of its 95 % interval) of values (seeds, g) of each set."""
    found = average_of([estimate(values.mean(0)) for values in by_set])
    found = found.with_seeds(torch.stack([values.mean(1) for values in by_set]).mean(0).tolist())
    return found.mean, found.half


def _with_averages(
    cases: Mapping[Case, Values], counts: Mapping[Case, int]
) -> Iterable[tuple[str, str, list[Values], int]]:
    """Yield (set, condition, values of each set, number of episodes), first the averages over several sets."""
    sets = list(dict.fromkeys(data for _, data in cases))
    for condition in dict.fromkeys(condition for condition, _ in cases) if len(sets) > 1 else ():
        every = [cases[condition, data] for data in sets if (condition, data) in cases]
        if len(every) == len(sets):
            yield AVERAGE, condition, every, sum(counts[condition, data] for data in sets)
    for (condition, data), values in cases.items():
        yield data, condition, [values], counts[condition, data]


def _rules(protocol: str, cases: Mapping[Case, Values], counts: Mapping[Case, int]) -> Table:
    rows: list[list[str]] = []
    for data, condition, by_set, n in _with_averages(cases, counts):
        for name in by_set[0]:
            if name in ("folds", "optimistic", "variance") or not all(name in values for values in by_set):
                continue
            mean, half = _interval([values[name] for values in by_set])
            accuracy = interval_text(mean, mean - half, mean + half, SHARE)
            middle, half = _interval([values[name] - values[MERGED] for values in by_set])
            gain = "–" if name == MERGED else bounds_text(middle, middle - half, middle + half, SHARE, sign=True)
            rows.append([data, condition, SHOWN.get(name, name), accuracy, gain, f"{n:,}"])
    heads = ["Data", "Condition", "Model", "accuracy in %", "Difference to merged", "n (episodes)"]
    return Table(f"Choosing experts, {protocol}", heads, rows, set(), texts=3, folded=len(rows) > 30)


def _worth(protocol: str, cases: Mapping[Case, Values], counts: Mapping[Case, int]) -> Table:
    rows: list[list[str]] = []
    for data, condition, by_set, n in _with_averages(cases, counts):
        low, high = (_interval([values[end] for values in by_set])[0] for end in ("folds", "optimistic"))
        bracket = f"[{number_text(low, SHARE)}, {number_text(high, SHARE)}]"
        spread = spread_text(*_interval([values["variance"] for values in by_set]))
        rows.append([data, condition, bracket, spread, f"{n:,}"])
    heads = ["Data", "Condition", "Best of each task in %", "Spread in points", "n (episodes)"]
    return Table(f"What a choice by task is worth, {protocol}", heads, rows, set(), texts=2, folded=len(rows) > 30)


def spread_text(variance: float, half: float) -> str:
    """Return a standard deviation in per cent with its 95 % interval. half: half width of the interval of the variance."""
    if variance <= half:
        most = f", at most {number_text(math.sqrt(variance + half), SHARE)}" if variance + half > 0 else ""
        return f"not resolved{most}"
    low, middle, high = (math.sqrt(value) for value in (variance - half, variance, variance + half))
    ends = [number_text(value, SHARE, half=(high - low) / 2) for value in (middle, low, high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"
