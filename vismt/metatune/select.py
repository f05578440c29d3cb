"""Choosing the settings of merging and fine-tuning on labelled validation tasks (AMT searches them for each domain).

Greedy, in the paper's order: sharpness and balance together on the untrimmed pool, then the trim given those, then the
rate of fine-tuning given all. The value of a candidate is the mean over tasks of query accuracy, clean, or of clean and
attacked alike. Ties keep the earlier candidate, and the default is always the first. The release searches on six episodes
of the test split with their query labels; here the caller hands in tasks that cannot be test tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vismt import console
from vismt.metatune.finetune import FineTuned, FineTuneSettings
from vismt.metatune.merging import MergeSettings, PoolNet, expert_scores, mixture_weights
from vismt.metatune.pool import ExpertPool
from vismt.stats import mean_interval

# support (s, 3, h, w), its labels (s,), query (m, 3, h, w), its labels (m,)
Task = tuple[Tensor, Tensor, Tensor, Tensor]
# classifier, query, labels, number of the task -> accuracy in [0, 1]
Judge = Callable[[nn.Module, Tensor, Tensor, int], float]


@dataclass(frozen=True)
class Grid:
    """Candidates besides the default: all pairs of beta and balance; trims; rates of fine-tuning."""

    beta: Sequence[float] = ()
    balance: Sequence[float] = ()
    trim: Sequence[dict[str, float]] = ()
    lr: Sequence[float] = ()


@dataclass(frozen=True)
class Candidate:
    """One tried setting: its stage, what differs from the default, mean and 95 % half width over n tasks."""

    stage: str
    settings: dict[str, Any]
    value: float
    ci95: float
    n: int
    chosen: bool
    default: bool


def choose(
    pool: ExpertPool,
    tasks: Sequence[Task],
    merging: MergeSettings,
    tuning: FineTuneSettings,
    grid: Grid,
    judge: Judge,
) -> tuple[MergeSettings, FineTuneSettings, list[Candidate]]:
    """The best settings of the grid on `tasks` (two or more), and every candidate that was tried, stage by stage."""
    found: list[Candidate] = []
    base = replace(merging, strategy="merge", trim={})
    pairs = [(base.beta, base.balance)]
    pairs += [(b, w) for b in grid.beta or [base.beta] for w in grid.balance or [base.balance] if (b, w) != pairs[0]]
    if len(pairs) > 1:
        values = _mixtures(pool, tasks, base, pairs, judge)
        best = _keep(found, "merging", [{"beta": b, "balance": w} for b, w in pairs], values)
        merging = replace(merging, beta=pairs[best][0], balance=pairs[best][1])
    trims = [dict(merging.trim), *(dict(one) for one in grid.trim if dict(one) != dict(merging.trim))]
    if len(trims) > 1:
        nets = [PoolNet(pool, replace(merging, strategy="merge", trim=trim)) for trim in trims]
        best = _keep(found, "trim", [{"trim": trim} for trim in trims], _judged(nets, tasks, judge, "trim"))
        merging = replace(merging, trim=trims[best])
    rates = [tuning.lr, *(rate for rate in grid.lr if rate != tuning.lr)]
    if len(rates) > 1:
        net = PoolNet(pool, replace(merging, strategy="merge"))
        tuned = [FineTuned(net, replace(tuning, lr=rate)) for rate in rates]
        best = _keep(found, "finetune", [{"lr": rate} for rate in rates], _judged(tuned, tasks, judge, "fine-tuning"))
        tuning = replace(tuning, lr=rates[best])
    return merging, tuning, found


def _mixtures(
    pool: ExpertPool,
    tasks: Sequence[Task],
    base: MergeSettings,
    pairs: Sequence[tuple[float, float]],
    judge: Judge,
) -> list[list[float]]:
    """Values of every pair on every task; experts are scored once a task, and equal mixtures are judged once."""
    net = PoolNet(pool, base)
    values: list[list[float]] = [[] for _ in pairs]
    for number, (support, labels, query, truth) in enumerate(console.track(tasks, "select", "merging")):
        cosines = net.cosines(support, labels)
        known: dict[tuple[float, ...], float] = {}
        for place, (beta, balance) in enumerate(pairs):
            zeta = mixture_weights(expert_scores(cosines, labels, balance)[0], beta, base.top_k)
            key = tuple(round(float(share), 4) for share in zeta)
            if key not in known:
                known[key] = judge(net.task(zeta, support, labels), query, truth, number)
            values[place].append(known[key])
    return values


def _judged(nets: Sequence[nn.Module], tasks: Sequence[Task], judge: Judge, label: str) -> list[list[float]]:
    values: list[list[float]] = [[] for _ in nets]
    for number, (support, labels, query, truth) in enumerate(console.track(tasks, "select", label)):
        for place, net in enumerate(nets):
            values[place].append(judge(net.classifier(support, labels), query, truth, number))
    return values


def _keep(
    found: list[Candidate], stage: str, settings: Sequence[dict[str, Any]], values: Sequence[Sequence[float]]
) -> int:
    """Note every candidate of a stage; the place of the first best one."""
    means = torch.tensor([mean_interval(one)[0] for one in values])
    best = next(place for place, mean in enumerate(means) if mean >= means.max() - 1e-9)
    for place, (one, own) in enumerate(zip(settings, values)):
        mean, half = mean_interval(own)
        found.append(Candidate(stage, one, mean, half, len(own), place == best, place == 0))
    return best
