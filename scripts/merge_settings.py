"""Search of the settings of merging and fine-tuning on validation tasks: `python -m scripts.merge_settings RUN`.

The script reads a trained few-shot run with a pool and a `select` section, whose sets cannot be test sets, and writes what it
chooses into pool/seed-N/selection.json of the run. `vismt evaluate RUN` then evaluates `merged` with it. Run the script between
`vismt train` and `vismt evaluate`. All models but "merged" and "merged+finetune" keep the settings of the configuration.

Greedy, in the paper's order: sharpness and balance together on the untrimmed pool, then the trim given those, then the
rate of fine-tuning given all. The value of a candidate is the mean over tasks of query accuracy, clean, or of clean and
attacked with equal weight. Ties keep the earlier candidate, and the default is always the first. The release searches on
six episodes of the test split with their query labels.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.engine import runtime
from vismt.jobs import open_run
from vismt.jobs.fewshot.arms import strategy_of
from vismt.jobs.fewshot.config import MERGED
from vismt.jobs.fewshot.data import SELECT_SEED
from vismt.jobs.fewshot.job import FewShotJob
from vismt.jobs.fewshot.models import SELECTED_FOR, SELECTED_SETTINGS, SELECTION, Models
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import RULES, MergeSettings
from vismt.metatune.finetuning.finetune import FineTuned
from vismt.metatune.settings import FineTuneSettings
from vismt.storage.files import atomic_write, sealed
from vismt.uncertainty.intervals import mean_interval

# support (s, 3, h, w), its labels (s,), query (m, 3, h, w), its labels (m,)
LabelledTask = tuple[Tensor, Tensor, Tensor, Tensor]
# classifier, query, labels, number of the task -> accuracy in [0, 1]
Judge = Callable[[nn.Module, Tensor, Tensor, int], float]


@dataclass(frozen=True)
class SearchGrid:
    """Candidates besides the default: all pairs of beta and balance; trims; rates of fine-tuning."""

    beta: Sequence[float] = (1.0, 4.0, 12.0)
    balance: Sequence[float] = (0.0, 0.3, 0.6, 0.9)
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
            candidates, "trim", [{"trim": trim} for trim in trims], _judge_all(nets, tasks, judge, "trim")
        )
        merging = replace(merging, trim=trims[best])
    rates = [tuning.lr, *(rate for rate in grid.lr if rate != tuning.lr)]
    if len(rates) > 1:
        net = PoolNet(pool, merging)
        tuned = [FineTuned(net, replace(tuning, lr=rate)) for rate in rates]
        best = _record_stage(
            candidates, "finetune", [{"lr": rate} for rate in rates], _judge_all(tuned, tasks, judge, "fine-tuning")
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


def _judge_all(nets: Sequence[nn.Module], tasks: Sequence[LabelledTask], judge: Judge, label: str) -> list[list[float]]:
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


def choose(folder: Path, grid: SearchGrid) -> None:
    """Choose the settings of each training seed of a run. Raises UserError for a run without a pool or a select section."""
    run = open_run(folder)
    if not isinstance(run.job, FewShotJob) or run.job.config.pool is None:
        raise UserError(f"merge settings: run '{folder}' has no pool of experts.")
    for seed in run.job.study.seeds:
        models = run.job.models(seed)
        atomic_write(models.pool_folder / SELECTION, sealed({SELECTED_SETTINGS: _choose(models, grid)}, indent=1))


def _choose(models: Models, grid: SearchGrid) -> dict[str, Any]:
    config, pool, names = models.config, models.pool(), models.config.selection.data
    tasks, judge = _validation(models, names)
    base = MergeSettings(strategy_of(config, MERGED))
    merging, tuning, tried = search_settings(pool, tasks, base, config.finetune, grid, judge)
    for candidate in tried:
        if candidate.chosen or candidate.default:
            what = "chosen" if candidate.chosen else "default"
            value = f"{100 * candidate.value:.1f} ± {100 * candidate.ci95:.1f}"
            console.stage("select", f"{candidate.stage}  {what} {candidate.settings}   {value}")
    attack = config.selection.attack
    under = "" if attack is None else f", and accuracy under {attack.spec()}, with equal weight"
    return {
        "merging": {"beta": merging.beta, "balance": merging.balance, "trim": dict(merging.trim)},
        "lr": tuning.lr,
        "on": ", ".join(names),
        "criterion": f"clean accuracy{under}",
        "tried": [asdict(candidate) for candidate in tried],
        SELECTED_FOR: str(pool.identity()),
    }


def _validation(models: Models, names: Sequence[str]) -> tuple[list[LabelledTask], Judge]:
    """Return the episodes of the select section, and how a classifier is judged on one."""
    select, device = models.config.selection, runtime.processes().device
    models.pool().requires_grad_(False).eval().to(device)
    tasks: list[LabelledTask] = []
    for name in names:
        pixels, sampler = models.data.open(name), models.data.validation_sampler(name)
        for number in range(select.episodes):
            episode = sampler[number]
            support, query = pixels[episode.support].to(device), pixels[episode.query].to(device)
            tasks.append((support, episode.support_labels.to(device), query, episode.query_labels.to(device)))
    attack = None if select.attack is None else select.attack.spec()

    def judge(classifier: nn.Module, query: Tensor, truth: Tensor, number: int) -> float:
        with torch.no_grad():
            clean = float((classifier(query).argmax(1) == truth).double().mean())
        if attack is None:
            return clean
        keys = [(mix_seed(SELECT_SEED, "attack", number), position) for position in range(len(query))]
        changed = attack.perturb(classifier, query, truth, num_classes=int(truth.max()) + 1, keys=keys)
        with torch.no_grad():
            return 0.5 * clean + 0.5 * float((classifier(changed).argmax(1) == truth).double().mean())

    return tasks, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a trained run with a pool")
    for name in ("beta", "balance", "lr"):
        parser.add_argument(f"--{name}", type=float, nargs="*", help=f"tried values of {name}")
    parser.add_argument("--trim", nargs="*", default=[], metavar="PATTERN=SHARE", help="tried trims of one pattern")
    options = parser.parse_args()
    given = {name: value for name in ("beta", "balance", "lr") if (value := getattr(options, name)) is not None}
    trims = [{name: float(share)} for name, _, share in (text.rpartition("=") for text in options.trim)]
    choose(options.run, SearchGrid(**given, trim=trims))


if __name__ == "__main__":
    main()
