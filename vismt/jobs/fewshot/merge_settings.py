"""The `select` section of a few-shot configuration: validation tasks that cannot be test tasks, and the choice made on them.

Validation uses other sets (or other splits of a card) than those evaluated, with one choice for all evaluated sets; or, with
class_share, a share of the classes of each evaluated set, which its test episodes then never draw, with one choice for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.data.set_entries import shown_name
from vismt.engine import runtime
from vismt.jobs.fewshot.arms import strategy_of
from vismt.jobs.fewshot.config import MERGED
from vismt.jobs.fewshot.data import FewShotData
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.amt.settings_search import Judge, LabelledTask, SearchGrid, judge_all, search_settings
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.settings import FineTuneSettings
from vismt.report.tables import Table
from vismt.storage.files import atomic_write, read_sealed, sealed

SELECTION, VALIDATION = "selection.json", "validation.json"
POOL = ":pool"  # entry with the identity of the experts; no set has a ':' in its name
Chosen = tuple[MergeSettings, FineTuneSettings]


class PoolSettings:
    """Settings of the model "merged" by evaluated set; chosen on first use and saved in selection.json of `folder`."""

    def __init__(self, data: FewShotData, folder: Path, pool: Callable[[], ExpertPool]) -> None:
        self.config = data.config
        self.folder = folder
        self._pool = pool
        self._open, self._groups = data.open, data.groups
        self._chosen: dict[str, Chosen] = {}

    def chosen(self, data: str | None) -> Chosen:
        """Return the settings of merging and fine-tuning on the set `data`; None for a set that the run does not evaluate."""
        config = self.config
        select = config.select
        key = data if select is not None and select.class_share else "all"
        if select is None or key is None:
            return config.merging, config.finetune
        if key not in self._chosen:
            path = self.folder / SELECTION
            saved = read_sealed(path, f"run '{self.folder}'") if path.exists() else {}
            experts = str(self._pool().identity())
            # pool.folder may hold other experts now; entries of earlier versions do not say on which they were chosen.
            if key not in saved or saved[key].get(POOL, experts) != experts:
                chosen = self._choose(select.data if key == "all" else [key], key)
                saved[key] = {**chosen, POOL: experts}
                atomic_write(path, sealed(saved, indent=1))
            self._chosen[key] = (
                replace(config.merging, **saved[key]["merging"]),
                replace(config.finetune, lr=saved[key]["lr"]),
            )
        return self._chosen[key]

    def classes(self, data: str, part: str) -> list[int] | None:
        """Return the class ids of the "validation" or the "test" episodes of an evaluated set; None for all classes."""
        select = self.config.select
        if select is None or not select.class_share:
            return None
        pixels = self._open(data)
        ids = pixels.labels.unique()
        seed = mix_seed(select.seed, "classes", pixels.name)
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        ways = self.config.evaluate.ways_in(data)
        kept = max(ways, math.ceil(select.class_share * len(ids)))
        if len(ids) - kept < ways:
            raise UserError(
                f"select.class_share: '{pixels.name}' has {len(ids)} classes; {kept} for the choice leave fewer than "
                f"{ways} to test on. Choose on other sets with select.data instead."
            )
        return sorted((order[:kept] if part == "validation" else order[kept:]).tolist())

    def _choose(self, names: list[str], key: str) -> dict[str, Any]:
        config = self.config
        select = config.selection
        pool, tasks, judge = self._validation(names)
        grid = SearchGrid(select.beta, select.balance, select.trim, select.lr)
        base = replace(config.merging, strategy=strategy_of(config, MERGED))
        merging, tuning, tried = search_settings(pool, tasks, base, config.finetune, grid, judge)
        for candidate in tried:
            if candidate.chosen or candidate.default:
                what = "chosen" if candidate.chosen else "default"
                value = f"{100 * candidate.value:.1f} ± {100 * candidate.ci95:.1f}"
                console.stage("select", f"{key}  {candidate.stage}  {what} {candidate.settings}   {value}")
        criterion = "clean accuracy"
        if select.attack is not None:
            criterion = f"mean of clean accuracy and accuracy under {select.attack.spec()}"
        return {
            "merging": {"beta": merging.beta, "balance": merging.balance, "trim": dict(merging.trim)},
            "lr": tuning.lr,
            "on": names if key == "all" else f"{select.class_share:g} of the classes of {key}",
            "criterion": criterion,
            "tried": [asdict(candidate) for candidate in tried],
        }

    def validate_experts(self, data: str, labels: Sequence[str]) -> None:
        """Save the mean value of experts on the validation tasks of an evaluated set in validation.json, unless it has them."""
        select = self.config.selection
        key = shown_name(data) if select.class_share else "all"
        path = self.folder / VALIDATION
        saved = read_sealed(path, f"run '{self.folder}'") if path.exists() else {}
        experts = str(self._pool().identity())
        if saved.get(POOL, experts) != experts:
            saved = {}
        if set(saved.get(key, ())) == set(labels):
            return
        saved[POOL] = experts
        pool, tasks, judge = self._validation([data] if select.class_share else select.data)
        nets = [PoolNet(pool, replace(self.config.merging, strategy="expert", expert=label)) for label in labels]
        values = judge_all(nets, tasks, judge, "experts")
        saved[key] = {label: math.fsum(by_task) / len(by_task) for label, by_task in zip(labels, values)}
        texts = "   ".join(f"{label} {100 * value:.1f}" for label, value in saved[key].items())
        console.stage("select", f"{key}  experts   {texts}   (n = {len(tasks)} tasks)")
        atomic_write(path, sealed(saved, indent=1))

    def _validation(self, names: Sequence[str]) -> tuple[ExpertPool, list[LabelledTask], Judge]:
        select = self.config.selection
        device = runtime.processes().device
        pool = self._pool().requires_grad_(False).eval().to(device)
        tasks: list[LabelledTask] = []
        for name in names:
            pixels, sampler = self._open(name), self.sampler(name)
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
            keys = [(mix_seed(select.seed, "attack", number), position) for position in range(len(query))]
            changed = attack.perturb(classifier, query, truth, num_classes=int(truth.max()) + 1, keys=keys)
            with torch.no_grad():
                return 0.5 * clean + 0.5 * float((classifier(changed).argmax(1) == truth).double().mean())

        return pool, tasks, judge

    def sampler(self, data: str) -> EpisodeSampler:
        """Return the validation episodes of a set."""
        select = self.config.selection
        pixels = self._open(data)
        classes = self.classes(data, "validation")
        return EpisodeSampler(
            pixels.labels,
            ways=self.config.evaluate.ways_in(data, len(pixels.labels.unique() if classes is None else classes)),
            shots=select.shots,
            queries=select.queries,
            seed=select.seed,
            classes=classes,
            names=pixels.classes,
            groups=self._groups(data),
        )


def chosen_settings(folder: Path) -> list[tuple[Table, str]]:
    """Return a table of every candidate with its value and marks for the default and the choice, with a note.

    folder: of the pool, with selection.json where settings were chosen.
    """
    path = folder / SELECTION
    if not path.exists():
        return []
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    validation = []
    for data, choice in read_sealed(path, f"run '{folder}'").items():
        on = choice["on"] if isinstance(choice["on"], str) else ", ".join(choice["on"])
        validation.append(f"{data}: {on}; {choice['criterion']}")
        for candidate in choice["tried"]:
            if candidate["chosen"]:
                best.add((len(rows), 4))
            mark = " and ".join(word for word in ("default", "chosen") if candidate[word])
            settings = ", ".join(
                f"{name} {value if value or value == 0.0 else 'none'}" for name, value in candidate["settings"].items()
            )
            value = f"{100 * candidate['value']:.1f} ± {100 * candidate['ci95']:.1f}"
            rows.append([data, candidate["stage"], settings, mark, value, str(candidate["n"])])
    heads = ["Evaluated", "Stage", "Setting", "", "Value in %", "n (tasks)"]
    note = (
        "Tried stage by stage on validation tasks, none of which can be a test task; ties keep the earlier setting, the "
        f"default first. Validation: {'; '.join(validation)}. The model “merged” has the chosen settings, all others the "
        "default. First training seed."
    )
    return [(Table("Chosen settings", heads, rows, best, texts=4), note)]
