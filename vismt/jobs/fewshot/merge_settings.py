"""The `select` section of a few-shot configuration: validation tasks that cannot be test tasks.

Validation uses other sets (or other splits of a card) than those evaluated; or, with class_share, a share of the classes of each
evaluated set, which its test episodes then never draw. Settings of the model "merged" that scripts/merge_settings.py chose on
these tasks are in selection.json of a pool's folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.jobs.fewshot.data import FewShotData
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.settings import FineTuneSettings
from vismt.storage.files import read_sealed

SELECTION = "selection.json"
POOL = ":pool"  # entry with the identity of the experts; no set has a ':' in its name
Chosen = tuple[MergeSettings, FineTuneSettings]


class PoolSettings:
    """Settings of the model "merged" by evaluated set, and the validation episodes."""

    def __init__(self, data: FewShotData, folder: Path, pool: Callable[[], ExpertPool]) -> None:
        self.config = data.config
        self.folder = folder
        self._pool = pool
        self._open, self._groups = data.open, data.groups

    def chosen(self, data: str | None) -> Chosen:
        """Return the settings of merging and fine-tuning on the set `data`; None for a set that the run does not evaluate.

        Raises UserError for settings that were chosen for other experts.
        """
        config, path = self.config, self.folder / SELECTION
        key = data if config.select is not None and config.select.class_share else "all"
        saved = read_sealed(path, f"run '{self.folder}'") if path.exists() else {}
        if key not in saved:
            return config.merging, config.finetune
        if saved[key].get(POOL) != str(self._pool().identity()):
            raise UserError(
                f"run '{self.folder}': {SELECTION} was chosen for other experts; delete it, or choose again."
            )
        return replace(config.merging, **saved[key]["merging"]), replace(config.finetune, lr=saved[key]["lr"])

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
