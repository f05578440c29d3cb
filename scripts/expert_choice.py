"""What a choice among the experts of a pool for each task is worth: `python -m scripts.expert_choice RUN`.

It is estimated without a model, from the records of a run that evaluates `merged` and two or more `expert:LABEL`. The script
prints the rules of the pool beside the best experts, and what a choice by task is worth. It adds the score GAIN of `merged` to
the run's results. Where episodes lie in parts that share no image, all values are means by part. Several training seeds are
averaged, and their spread is in the intervals.

y_teq is 1 where expert e answers query q of task t right, else 0, and mu_te is its expectation. The queries of a task are divided
into F folds at random, class by class, and e_f is the best expert on all folds but f (ties share the weight):

    value of choosing   mean_t sum_f sum_{q in f} y_{t e_f q} / Q_t       F = 2: split halves; the mean of many divisions
    optimistic value    mean_t max_e mean_q y_teq                         chosen on the queries that it is scored on
    fixed expert        mean_t mean_q y_{t e(t) q}                        e(t) the best on average over the other tasks

The expected score on queries that the choice has not seen is mu_te of the chosen expert, so the first line estimates without
bias what a choice by (F - 1) / F of the queries is worth; it is at most the mean of max_e mu_te. The second line is biased
upwards: of experts that are equal it takes the luckiest. Divisions of the same queries are not replications: the uncertainty is
that of tasks, or of groups of tasks which share no image (Cawley and Talbot, On Over-fitting in Model Selection, JMLR 11, 2010).

How much do tasks differ in which expert suits them? For the difference d_tq = y_taq - y_tbq of two experts, the means over the
two halves of a task's queries have independent errors, so that their covariance over the tasks is the variance of the true
differences mu_ta - mu_tb. Its mean over all divisions into halves has a closed form, the estimator of a random effect from an
analysis of variance (Searle, Casella and McCulloch, Variance Components, 1992),

    sigma^2 = var_t(mean_q d_tq) - mean_t sum_c n_tc s_tc^2 / Q_t^2

with s_tc^2 the variance (n - 1) of d over the n_tc queries of class c. Of P experts it is the mean over the pairs, by which it is
2 / (P - 1) times the sum over the experts of the same form in y_teq - mean_e y_teq. It can be negative, most where it is truly 0.
The support is the same in both halves, so its luck counts as part of the task.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.jobs import open_run
from vismt.jobs.fewshot.arms import split_head
from vismt.jobs.fewshot.config import DEFAULT_MERGED, EXPERT, MERGED, PROTOTYPES, FewShotConfig
from vismt.jobs.fewshot.evaluation import episodes_file
from vismt.metatune.protocol.episode_outcome import right_field
from vismt.report.comparison import AVERAGE, MANY_CORRUPTIONS
from vismt.report.results import (
    RESULTS,
    Result,
    Score,
    ValuesByExample,
    read_results,
    result_of,
    write_results,
    write_values,
)
from vismt.report.tables import Table, bounds_text, interval_text, number_text
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import (
    NUMBER,
    SHARE,
    Condition,
    Measure,
    average_of,
    estimate,
    group_index,
    interval_kind_text,
    over_seeds,
    weakest_kind,
    without_seeds_kind,
)

DIVISIONS = 20  # of the queries of a task into folds
FOLDS = 10
GAIN = "gain of a choice by task in points"
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


def evaluated_experts(config: FewShotConfig) -> list[str]:
    """Return the names of the pool's experts that are evaluated alone, with prototypes."""
    models = config.evaluate.models if config.pool is not None and config.head.name == PROTOTYPES else []
    return [model for model in models if model.startswith(EXPERT) and not split_head(model)[1]]


def choice_tables(
    folder: Path, config: FewShotConfig, seeds: Sequence[int], results: Sequence[Result]
) -> list[tuple[Table, str]]:
    """Return two tables for each protocol; [] unless "merged" and two experts or more are evaluated."""
    rows = [row for row in results if row.seed is None and row.metric == "accuracy"]
    arms = list(dict.fromkeys(row.arm for row in rows))
    experts = evaluated_experts(config)
    if MERGED not in arms or len(experts) < 2:
        return []
    rules = [arm for arm in arms if arm.startswith(f"{MERGED}:") and not split_head(arm)[1]]
    models = [arm for arm in arms if arm in (DEFAULT_MERGED, AVERAGE, "min_ce", "logits") or arm in rules]
    tables = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        merged = [row for row in rows if row.arm == MERGED and row.protocol == protocol]
        if len({row.condition for row in merged if row.kind == "corruption"}) >= MANY_CORRUPTIONS:
            merged = [row for row in merged if row.kind != "corruption"]
        cases: dict[Case, Values] = {}
        counts: dict[Case, int] = {}
        for row in merged:
            by_seed = [_of_seed(folder, seed, row, [MERGED, *models], experts) for seed in seeds]
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


def _of_seed(folder: Path, seed: int, row: Result, models: Sequence[str], experts: Sequence[str]) -> Values:
    case = (row.data, row.protocol, row.condition)
    groups = torch.arange(row.n) % (row.parts or row.n)
    shown = {}
    for name in models:
        _, found = _episodes(folder, seed, *case, name)
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
    experts = evaluated_experts(config)
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
        queries = header.get("protocol", {}).get("sampler", {}).get("queries", 0)
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


@dataclass(frozen=True)
class ChoiceValues:
    """Values (g,), float64, by group of tasks: by task where tasks are independent; the mean is the estimate.

    fixed: of the best expert on the tasks of the other groups. halves, folds: of choosing an expert by half, or by nine tenths,
    of a task's queries. optimistic: by the queries that it is scored on. variance: pseudo-values of the delete-a-group
    jackknife of sigma^2, whose spread is that of the estimate.
    """

    fixed: Tensor
    halves: Tensor
    folds: Tensor
    optimistic: Tensor
    variance: Tensor


def choice(right: Tensor, labels: Tensor, groups: Tensor | None = None, seed: int = 0) -> ChoiceValues:
    """Return what a choice among experts is worth.

    Args:
        right: (e, t, q), whether each of e >= 2 experts answers query q of task t right.
        labels: (t, q) int, the class of each query; negative where a task has fewer than q queries.
        groups: (t,) int, the same number for tasks that may share images; None for independent tasks. Groups weigh the same.
        seed: of the divisions.

    Raises:
        UserError: fewer than two experts or queries, fewer than three groups, or shapes that do not fit.
    """
    tasks = len(labels)
    groups = torch.arange(tasks) if groups is None else groups.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1 if tasks else 0
    fits = right.ndim == 3 and right.shape[1:] == labels.shape and groups.shape == (tasks,)
    if not fits or len(right) < 2 or count < 3 or int((labels >= 0).sum(1).min()) < 2:
        raise UserError(
            f"choice among experts: answers {tuple(right.shape)}, labels {tuple(labels.shape)}, {count} groups of tasks: needed "
            "(experts, tasks, queries) and (tasks, queries), two or more experts and queries, three or more groups."
        )
    right = right.double() * (labels >= 0)
    accuracies = right.sum(2) / (labels >= 0).sum(1)
    member = F.one_hot(groups, count).double()  # (t, g)

    def by_group(values: Tensor) -> Tensor:
        return values @ member / member.sum(0)

    sums = accuracies @ member
    best = _winners(sums.sum(1, keepdim=True) - sums)  # (e, g)
    return ChoiceValues(
        fixed=by_group((best[:, groups] * accuracies).sum(0)),
        halves=by_group(crossed(right, labels, 2, seed)),
        folds=by_group(crossed(right, labels, FOLDS, seed)),
        optimistic=by_group(accuracies.amax(0)),
        variance=_jackknife(*_moments(right, labels), member),
    )


def crossed(right: Tensor, labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Return the value of choosing (t,) by all folds but the one that is scored, the mean of DIVISIONS divisions.

    Arguments as in `choice`.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = (labels >= 0).double()
    total = (right * valid).sum(2)[:, None]
    found = torch.zeros(len(labels), dtype=torch.float64)
    for _ in range(DIVISIONS):
        drawn = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        order = torch.where(labels < 0, torch.inf, labels + drawn).argsort(1)  # by class, at random within it
        number = torch.empty_like(order).scatter_(1, order, torch.arange(labels.shape[1]).expand_as(order) % folds)
        fold = F.one_hot(number, folds) * valid[..., None]
        inside = torch.einsum("etq,tqf->eft", right.double(), fold)
        found += (_winners(total - inside) * inside).sum((0, 1))
    return found / valid.sum(1) / DIVISIONS


def _winners(scores: Tensor) -> Tensor:
    """Return the weights (e, ...) of the best experts; ties, up to rounding, share the weight."""
    return F.normalize((scores >= scores.amax(0) - 1e-9).double(), p=1, dim=0)


def _moments(right: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (e, t) and error variance of it (t,), the latter summed over the experts, of answers less their mean over e.

    Where a class of a task has one query alone, the queries of the task count as one class: the error variance is then
    overestimated by the spread of the classes.
    """
    centred = right - right.mean(0)
    members = F.one_hot(labels + 1)[..., 1:].double()  # (t, q, c)
    counts = members.sum(1)
    if bool((counts == 1).any()):
        members = members.sum(2, keepdim=True)
        counts = members.sum(1)
    sums = torch.einsum("etq,tqc->etc", centred, members)
    squares = torch.einsum("etq,tqc->etc", centred.square(), members)
    variances = (squares - sums.square() / counts.clamp_min(1)) / (counts - 1).clamp_min(1)
    queries = counts.sum(1)
    return sums.sum(2) / queries, (counts * variances).sum((0, 2)) / queries.square()


def _jackknife(means: Tensor, errors: Tensor, member: Tensor) -> Tensor:
    """Return pseudo-values (g,) of sigma^2, with the estimate from all tasks as their mean.

    means: (e, t); errors: (t,); member: (t, g), one where a task belongs to a group.
    """

    def estimate(weights: Tensor) -> Tensor:
        """Return sigma^2 from the tasks with weight 1 in weights (t, k), one estimate for each column."""
        count = weights.sum(0)
        spread = means.square() @ weights - (means @ weights).square() / count
        return 2 / (len(means) - 1) * (spread.sum(0) / (count - 1) - errors @ weights / count)

    groups = member.shape[1]
    without = estimate(1 - member)
    return estimate(torch.ones_like(member[:, :1])) + (groups - 1) * (without.mean() - without)


def add_gains(folder: Path) -> list[tuple[Table, str]]:
    """Add GAIN to the results of a run, and return the tables. Raises UserError where its records do not tell it."""
    run = open_run(folder)
    config, seeds = run.config, run.job.study.seeds
    if not isinstance(config, FewShotConfig):
        raise UserError(f"expert choice: run '{folder}' is no few-shot run.")
    results = [row for row in read_results(folder / RESULTS) if row.metric != GAIN]
    values = ValuesByExample(folder)
    scores = {MERGED: [_score(row, values) for row in results if row.arm == MERGED and row.seed is None]}
    gains = choice_gains(folder, config, seeds, scores).get(MERGED)
    if gains is None:
        raise UserError(f"expert choice: run '{folder}' has no records of '{MERGED}' and two experts; evaluate them.")
    by_seed = {seed: choice_gains(folder, config, [seed], scores)[MERGED] for seed in seeds} if len(seeds) > 1 else {}
    of_seeds = [{score.key: score.measure.score for score in found} for found in by_seed.values()]
    means = [replace(one, measure=over_seeds(one.measure, [of[one.key] for of in of_seeds])) for one in gains]
    rows = [
        (result_of(score, MERGED, seed, run.job.split, run.hash), score.measure)
        for seed, found in {None: means, **by_seed}.items()
        for score in found
    ]
    write_values(folder, [(row, measure) for row, measure in rows if row.seed is None])
    write_results(folder, [*results, *(row for row, _ in rows)])
    return choice_tables(folder, config, seeds, results)


def _score(row: Result, values: ValuesByExample) -> Score:
    covers = without_seeds_kind(row.interval)
    measure = Measure(row.metric, values.of(row) or {}, row.scale, covers=covers, groups=values.groups(row))
    condition = Condition(row.condition, row.kind, row.family, row.level)
    return Score(row.task, row.data, row.protocol, measure, condition, row.unit, row.examples or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of an evaluated few-shot run")
    for table, note in add_gains(parser.parse_args().run):
        console.block(f"\n{table.title}")
        console.table(table.heads, table.rows)
        console.block(note)


if __name__ == "__main__":
    main()
