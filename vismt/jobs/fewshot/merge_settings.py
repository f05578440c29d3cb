"""The `select` section of a few-shot configuration: validation tasks that cannot be test tasks, and what was chosen on them.

Either other sets (or other splits of a card) than those evaluated, one choice for all; or, with class_share, for each
evaluated set a share of its own classes, which its test episodes then never draw, one choice for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt import console
from vismt.data.pixels import Pixels
from vismt.engine import runtime
from vismt.errors import UserError
from vismt.files import atomic_write, read_json
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.metatune.episodes import EpisodeSampler
from vismt.metatune.finetune import FineTuneSettings
from vismt.metatune.merging import MergeSettings
from vismt.metatune.pool import ExpertPool
from vismt.metatune.select import Grid, choose
from vismt.report.tables import Table
from vismt.seeds import mix_seed

SELECTION = "selection.json"
Chosen = tuple[MergeSettings, FineTuneSettings]


class Selection:
    """Settings of the model "merged" by evaluated set; chosen when first asked for and kept in selection.json."""

    def __init__(
        self, config: FewShotConfig, folder: Path, pool: Callable[[], ExpertPool], opened: Callable[[str], Pixels]
    ) -> None:
        self.config, self.folder, self._pool, self._open = config, folder, pool, opened
        self._known: dict[str, Chosen] = {}

    def settings(self, data: str) -> Chosen:
        """What to merge and fine-tune with on the set `data`."""
        config, select = self.config, self.config.select
        if select is None:
            return config.merging, config.finetune
        key = data if select.class_share else "all"
        if key not in self._known:
            path = self.folder / SELECTION
            saved = read_json(path, f"run '{self.folder}'") if path.exists() else {}
            if key not in saved:
                saved[key] = self._choose(select.data if key == "all" else [data], key)
                atomic_write(path, json.dumps(saved, indent=1))
            self._known[key] = (
                replace(config.merging, **saved[key]["merging"]),
                replace(config.finetune, lr=saved[key]["lr"]),
            )
        return self._known[key]

    def classes(self, pixels: Pixels, part: str) -> list[int] | None:
        """Ids of the classes for the "validation" or the "test" episodes of an evaluated set; None for all of them."""
        share = self.config.select.class_share if self.config.select is not None else 0.0
        if not share:
            return None
        ids = pixels.labels.unique()
        seed = mix_seed(self.config.select.seed, "classes", pixels.name)
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        ways = self.config.evaluate.ways
        kept = max(ways, math.ceil(share * len(ids)))
        if len(ids) - kept < ways:
            raise UserError(
                f"select.class_share: '{pixels.name}' has {len(ids)} classes; {kept} for the choice leave fewer than "
                f"{ways} to test on. Choose on other sets with select.data instead."
            )
        return sorted((order[:kept] if part == "validation" else order[kept:]).tolist())

    def _choose(self, names: list[str], key: str) -> dict[str, Any]:
        config, select = self.config, self.config.select
        device = runtime.processes().device
        pool = self._pool().requires_grad_(False).eval().to(device)
        tasks = [tuple(part.to(device) for part in task) for name in names for task in self._tasks(name)]
        attack = None if select.attack is None else select.attack.spec()

        def judge(classifier: nn.Module, query: Tensor, truth: Tensor, number: int) -> float:
            with torch.no_grad():
                clean = float((classifier(query).argmax(1) == truth).double().mean())
            if attack is None:
                return clean
            seed = mix_seed(select.seed, "attack", number)
            changed = attack.perturb(classifier, query, truth, num_classes=config.evaluate.ways, seed=seed)
            with torch.no_grad():
                return 0.5 * clean + 0.5 * float((classifier(changed).argmax(1) == truth).double().mean())

        grid = Grid(select.beta, select.balance, select.trim, select.lr)
        merging, tuning, tried = choose(pool, tasks, config.merging, config.finetune, grid, judge)
        for one in tried:
            if one.chosen or one.default:
                what = "chosen" if one.chosen else "default"
                value = f"{100 * one.value:.1f} ± {100 * one.ci95:.1f}"
                console.stage("select", f"{key}  {one.stage}  {what} {one.settings}   {value}")
        criterion = "clean accuracy" if attack is None else f"mean of clean accuracy and accuracy under {attack}"
        return {
            "merging": {"beta": merging.beta, "balance": merging.balance, "trim": dict(merging.trim)},
            "lr": tuning.lr,
            "on": names if key == "all" else f"{select.class_share:g} of the classes of {key}",
            "criterion": criterion,
            "tried": [asdict(one) for one in tried],
        }

    def _tasks(self, name: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        pixels, settings, select = self._open(name), self.config.evaluate, self.config.select
        sampler = EpisodeSampler(
            pixels.labels,
            ways=settings.ways,
            shots=select.shots,
            queries=select.queries,
            seed=select.seed,
            classes=self.classes(pixels, "validation"),
            names=pixels.classes,
        )
        drawn = [sampler[index] for index in range(select.episodes)]
        return [(pixels[one.support], one.support_labels, pixels[one.query], one.query_labels) for one in drawn]


def chosen_settings(folder: Path) -> list[tuple[Table, str]]:
    """For the report: every candidate with its value, the default and the choice marked, and how it was made."""
    path = folder / SELECTION
    if not path.exists():
        return []
    rows, best, on = [], set(), []
    for data, told in read_json(path, f"run '{folder}'").items():
        on.append(
            f"{data}: {told['on'] if isinstance(told['on'], str) else ', '.join(told['on'])}; {told['criterion']}"
        )
        for one in told["tried"]:
            mark = " and ".join(word for word, said in (("default", one["default"]), ("chosen", one["chosen"])) if said)
            texts = ", ".join(
                f"{name} {value if value or value == 0.0 else 'none'}" for name, value in one["settings"].items()
            )
            best |= {(len(rows), 4)} if one["chosen"] else set()
            rows.append(
                [data, one["stage"], texts, mark, f"{100 * one['value']:.1f} ± {100 * one['ci95']:.1f}", str(one["n"])]
            )
    heads = ["Evaluated", "Stage", "Setting", "", "Value in %", "n (tasks)"]
    note = (
        "Tried stage by stage on validation tasks, none of which can be a test task; ties keep the earlier setting, the "
        f"default first. Validation: {'; '.join(on)}. The model “merged” has the chosen settings, “merged:default” the default."
    )
    return [(Table("Chosen settings", heads, rows, best, texts=4), note)]
