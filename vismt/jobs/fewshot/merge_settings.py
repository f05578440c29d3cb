"""The `select` section of a few-shot configuration: validation tasks that cannot be test tasks.

Validation uses other sets, or other splits of a card, than the evaluation. selection.json in the folder of a pool has the
settings of the model "merged" that scripts/merge_settings.py chose on these tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vismt.base.errors import UserError
from vismt.jobs.fewshot.data import FewShotData
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.settings import FineTuneSettings
from vismt.storage.files import read_sealed

SELECTION = "selection.json"
SELECT_SEED = 2  # of the validation episodes
ALL, POOL = "all", ":pool"  # entries: the settings, and in them the identity of the experts
Chosen = tuple[MergeSettings, FineTuneSettings]


class PoolSettings:
    """Settings of the model "merged", and the validation episodes."""

    def __init__(self, data: FewShotData, folder: Path, pool: Callable[[], ExpertPool]) -> None:
        self.config = data.config
        self.folder = folder
        self._pool = pool
        self._open, self._groups = data.open, data.groups

    def chosen(self) -> Chosen:
        """Return the settings of merging and fine-tuning. Raises UserError for settings that were chosen for other experts."""
        config, path = self.config, self.folder / SELECTION
        saved = read_sealed(path, f"run '{self.folder}'") if path.exists() else {}
        if ALL not in saved:
            return MergeSettings(), config.finetune
        if saved[ALL].get(POOL) != str(self._pool().identity()):
            raise UserError(
                f"run '{self.folder}': {SELECTION} was chosen for other experts; delete it, or choose again."
            )
        return MergeSettings(**saved[ALL]["merging"]), replace(config.finetune, lr=saved[ALL]["lr"])

    def sampler(self, data: str) -> EpisodeSampler:
        """Return the validation episodes of a set."""
        select = self.config.selection
        pixels = self._open(data)
        return EpisodeSampler(
            pixels.labels,
            ways=self.config.evaluate.ways_in(data, len(pixels.labels.unique())),
            shots=select.shots,
            queries=select.queries,
            seed=SELECT_SEED,
            names=pixels.classes,
            groups=self._groups(data),
        )
