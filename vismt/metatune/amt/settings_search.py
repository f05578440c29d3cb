"""Search of the settings of merging and fine-tuning on labelled validation tasks (AMT searches them for each domain).

Greedy, in the paper's order: sharpness and balance together on the untrimmed pool, then the trim given those, then the
rate of fine-tuning given all. The value of a candidate is the mean over tasks of query accuracy, clean, or of clean and
attacked with equal weight. Ties keep the earlier candidate, and the default is always the first. The release searches on
six episodes of the test split with their query labels; here the caller passes tasks that cannot be test tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import RULES, MergeSettings
from vismt.metatune.finetuning.finetune import FineTuned
from vismt.metatune.settings import FineTuneSettings
from vismt.uncertainty.intervals import mean_interval

# support (s, 3, h, w), its labels (s,), query (m, 3, h, w), its labels (m,)
LabelledTask = tuple[Tensor, Tensor, Tensor, Tensor]
# classifier, query, labels, number of the task -> accuracy in [0, 1]
Judge = Callable[[nn.Module, Tensor, Tensor, int], float]


@dataclass(frozen=True)
class SearchGrid:
    """Candidates besides the default: all pairs of beta and balance; trims; rates of fine-tuning."""

    beta: Sequence[float] = ()
    balance: Sequence[float] = ()
    trim: Sequence[dict[str, float]] = ()
    lr: Sequence[float] = ()


@dataclass(frozen=True)
class Candidate:
    """An evaluated setting: its stage, what differs from the default, mean and 95 % half width over n tasks."""

    stage: str
    settings: dict[str, Any]
    value: float
    ci95: float
    n: int
    chosen: bool
    default: bool


def search_settings(
    pool: ExpertPool,
    tasks: Sequence[LabelledTask],
    merging: MergeSettings,
    tuning: FineTuneSettings,
    grid: SearchGrid,
    judge: Judge,
) -> tuple[MergeSettings, FineTuneSettings, list[Candidate]]:
    """Return the best settings of the grid on `tasks` (two or more), and every evaluated candidate, stage by stage.

    The rule is that of `merging`; beta and balance are searched for the paper's rule, which alone uses them.
    """
    candidates: list[Candidate] = []
    base = replace(merging, trim={})
    pairs = [(base.beta, base.balance)]
    betas, balances = grid.beta or [base.beta], grid.balance or [base.balance]
    pairs += [pair for pair in itertools.product(betas, balances) if pair != pairs[0]]
    if len(pairs) > 1 and merging.strategy == "paper":
        values = _judge_mixtures(pool, tasks, base, pairs, judge)
        best = _record_stage(candidates, "merging", [{"beta": b, "balance": w} for b, w in pairs], values)
        merging = replace(merging, beta=pairs[best][0], balance=pairs[best][1])
    trims = [dict(merging.trim), *(dict(trim) for trim in grid.trim if dict(trim) != dict(merging.trim))]
    if len(trims) > 1:
        nets = [PoolNet(pool, replace(merging, trim=trim)) for trim in trims]
        best = _record_stage(
            candidates, "trim", [{"trim": trim} for trim in trims], judge_all(nets, tasks, judge, "trim")
        )
        merging = replace(merging, trim=trims[best])
    rates = [tuning.lr, *(rate for rate in grid.lr if rate != tuning.lr)]
    if len(rates) > 1:
        net = PoolNet(pool, merging)
        tuned = [FineTuned(net, replace(tuning, lr=rate)) for rate in rates]
        best = _record_stage(
            candidates, "finetune", [{"lr": rate} for rate in rates], judge_all(tuned, tasks, judge, "fine-tuning")
        )
        tuning = replace(tuning, lr=rates[best])
    return merging, tuning, candidates


def _judge_mixtures(
    pool: ExpertPool,
    tasks: Sequence[LabelledTask],
    base: MergeSettings,
    pairs: Sequence[tuple[float, float]],
    judge: Judge,
) -> list[list[float]]:
    """Return the values of every pair on every task; experts are scored once a task, equal mixtures are judged once."""
    net = PoolNet(pool, base)
    values: list[list[float]] = [[] for _ in pairs]
    for number, (support, labels, query, truth) in enumerate(console.track(tasks, "select", "merging")):
        cosines = net.cosines(support, labels)
        judged: dict[tuple[float, ...], float] = {}
        for place, (beta, balance) in enumerate(pairs):
            zeta = RULES[base.strategy](cosines, labels, pool.scale, replace(base, beta=beta, balance=balance))
            key = tuple(round(float(share), 4) for share in zeta)
            if key not in judged:
                judged[key] = judge(net.task(zeta, support, labels), query, truth, number)
            values[place].append(judged[key])
    return values


def judge_all(nets: Sequence[nn.Module], tasks: Sequence[LabelledTask], judge: Judge, label: str) -> list[list[float]]:
    """Return the value of each net on each task; `label` names the progress bar."""
    values: list[list[float]] = [[] for _ in nets]
    for number, (support, labels, query, truth) in enumerate(console.track(tasks, "select", label)):
        for place, net in enumerate(nets):
            values[place].append(judge(net.classifier(support, labels), query, truth, number))
    return values


def _record_stage(
    candidates: list[Candidate], stage: str, settings: Sequence[dict[str, Any]], values: Sequence[Sequence[float]]
) -> int:
    """Append every candidate of a stage; return the index of the best, the first among equals."""
    intervals = [mean_interval(by_task) for by_task in values]
    means = torch.tensor([mean for mean, _ in intervals])
    best = next(place for place, mean in enumerate(means) if mean >= means.max() - 1e-9)
    for place, (changes, (mean, half)) in enumerate(zip(settings, intervals)):
        candidates.append(Candidate(stage, changes, mean, half, len(values[place]), place == best, place == 0))
    return best
