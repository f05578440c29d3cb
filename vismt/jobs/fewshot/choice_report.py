"""How well a pool's experts could be chosen: its rules beside the best expert on validation, and oracles.

v_ei is the accuracy of expert e on episode i of n, c(i) = argmax_e v_ei:

    oracle                              mean_i max_e v_ei
    oracle, choices of other episodes   mean_i mean_{j != i} v_{c(j) i}           ties of c(j) share its weight
    oracle, episodes shuffled           E max_e v_{e pi_e(i)},  pi_e independent, with replacement: sum_v v dG(v),
                                        G(v) = prod_e (share of episodes with v_ei <= v)

All are exact; the last has the jackknife's interval. Several training seeds are averaged episode by episode, and their spread is
in the intervals (vismt.uncertainty.intervals.Estimate).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.jobs.fewshot.arms import evaluated_experts, split_head
from vismt.jobs.fewshot.config import DEFAULT, EXPERT, MERGED, FewShotConfig
from vismt.jobs.fewshot.evaluation import episodes_file
from vismt.jobs.fewshot.merge_settings import VALIDATION
from vismt.report.comparison import AVERAGE
from vismt.report.results import Result
from vismt.report.tables import MANY_CORRUPTIONS, Table, bounds_text, interval_text
from vismt.storage.files import DIGEST, read_sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import SHARE, average_of, estimate, paired_bootstrap

BEST = "best expert on validation"
NOTE = (
    "“oracle” takes the best evaluated expert of each episode by the queries that it is scored on, so a part of its gain is "
    "luck: its choices given to other episodes know nothing of the task, and with every expert's episodes shuffled it picks "
    "among accuracies of unrelated tasks, so that an oracle which does not exceed that does not show that experts differ "
    "by task. "
    "“average” and “merged:uniform” are the equal soup. Differences to “merged” are paired by episode (95 % bootstrap "
    "interval; for averages over sets Student's t). Several training seeds are in all intervals."
)
ByModel = dict[str, Tensor]  # accuracies (n,) of the same episodes, or (seeds, n)


def choice_tables(
    folder: Path, config: FewShotConfig, seeds: Sequence[int], results: Sequence[Result]
) -> list[tuple[Table, str]]:
    """Return a table for each protocol; [] unless "merged" and two experts or more are evaluated."""
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
        cases = {}
        for row in merged:
            by_seed = [_of_seed(folder, config, seed, row, [MERGED, *models], experts) for seed in seeds]
            if all(by_seed):
                common = [name for name in by_seed[0] if all(name in values for values in by_seed)]
                stacked = {name: torch.stack([values[name] for values in by_seed]) for name in common}
                cases[row.condition, row.data] = stacked  # (seeds, n) by model
        if cases:
            tables.append((_table(protocol, cases), NOTE))
    return tables


def choose(accuracies: Tensor) -> ByModel:
    """Return the oracles' values (n,) by episode from the experts' accuracies (e, n); equations in the header."""
    count = accuracies.shape[1]
    best = accuracies.amax(0)
    choices = F.normalize((accuracies == best).to(accuracies), p=1, dim=0)
    others = (choices.sum(1, keepdim=True) - choices) / (count - 1)
    return {
        "oracle": best,
        "oracle, choices of other episodes": (others * accuracies).sum(0),
        "oracle, episodes shuffled": _shuffled(accuracies),
    }


def _shuffled(accuracies: Tensor) -> Tensor:
    """Return the jackknife's pseudo-values (n,) of E max_e v_{e pi_e(i)}, centred on it."""
    count = accuracies.shape[1]
    grid = accuracies.unique()
    below = (accuracies[..., None] <= grid).to(accuracies)  # (e, n, values)
    total = below.sum(1, keepdim=True)

    def expected(shares: Tensor) -> Tensor:
        return (grid * shares.prod(0).diff(dim=-1, prepend=grid.new_zeros(shares.shape[1], 1))).sum(-1)

    value, without = expected(total / count), expected((total - below) / (count - 1))
    return value + (count - 1) * (without.mean() - without)


def _of_seed(
    folder: Path, config: FewShotConfig, seed: int, row: Result, models: Sequence[str], experts: Sequence[str]
) -> ByModel:
    """Return the values of every model and yardstick of one training seed; {} where records are missing."""
    values = {}
    for arm in (*models, *experts):
        lines = read_lines(episodes_file(folder, seed, row.data, row.protocol, arm))
        by_episode = {line["episode"]: line[row.condition] for line in lines if {"episode", row.condition} <= set(line)}
        if len(by_episode) != row.n:
            return {}
        values[arm] = torch.tensor([by_episode[number] for number in sorted(by_episode)], dtype=torch.float64)
    shown = {arm: values[arm] for arm in models}
    path = folder / "pool" / f"seed-{seed}" / VALIDATION
    validated = read_sealed(path, f"run '{folder}'", (DIGEST,)) if path.exists() else {}
    share = config.select.class_share if config.select is not None else 0.0
    judged: dict[str, float] = validated.get(row.data if share else "all", {})
    if judged:
        shown[BEST] = values[EXPERT + max(judged, key=judged.__getitem__)]
    return {**shown, **choose(torch.stack([values[arm] for arm in experts]))}


def _interval(by_set: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return (mean over sets, half width of its 95 % interval) of values (seeds, n) by set."""
    found = average_of([estimate(values.mean(0)) for values in by_set.values()])
    found = found.with_seeds(torch.stack([values.mean(1) for values in by_set.values()]).mean(0).tolist())
    return found.mean, found.half


def _table(protocol: str, cases: Mapping[tuple[str, str], ByModel]) -> Table:
    """Return the table of one protocol: the average over sets first, then the sets."""
    conditions = list(dict.fromkeys(condition for condition, _ in cases))
    sets = list(dict.fromkeys(data for _, data in cases))
    rows: list[list[str]] = []
    for condition in conditions if len(sets) > 1 else ():
        every = {data: cases[condition, data] for data in sets if (condition, data) in cases}
        if len(every) == len(sets):
            rows += _average_rows(condition, every)
    for (condition, data), values in cases.items():
        for name, accuracies in values.items():
            middle, half = _interval({data: accuracies - values[MERGED]})
            difference = (middle, middle - half, middle + half)
            if len(accuracies) == 1:
                difference = paired_bootstrap(accuracies[0], values[MERGED][0])[:3]
            texts = _texts(_interval({data: accuracies}), None if name == MERGED else difference, accuracies.shape[1])
            rows.append([data, condition, name, *texts])
    heads = ["Data", "Condition", "Model", "accuracy in %", "Difference to merged", "n (episodes)"]
    return Table(f"Choosing experts, {protocol}", heads, rows, set(), texts=3, folded=len(rows) > 30)


def _average_rows(condition: str, every: Mapping[str, ByModel]) -> Iterable[list[str]]:
    for name in next(iter(every.values())):
        if not all(name in values for values in every.values()):
            continue
        interval = _interval({data: values[name] for data, values in every.items()})
        middle, half = _interval({data: values[name] - values[MERGED] for data, values in every.items()})
        difference = None if name == MERGED else (middle, middle - half, middle + half)
        count = sum(values[name].shape[1] for values in every.values())
        yield [AVERAGE, condition, name, *_texts(interval, difference, count)]


def _texts(interval: tuple[float, float], difference: tuple[float, float, float] | None, count: int) -> list[str]:
    gain = "–" if difference is None else bounds_text(difference, SHARE)
    return [interval_text(*interval, SHARE), gain, f"{count:,}"]
