"""A job with images of its own, which attacks and corruptions change: several tasks on one backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic

from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.jobs.job import Config, Job, Net
from vismt.report.results import Score
from vismt.robustness.conditions import AttackConfig, CorruptionConfig


class ImageJob(Job[Config, Net], Generic[Config, Net]):
    """A job whose trained nets the robustness job can evaluate on the job's own images."""

    def check_risk(self) -> None:
        """Raise UserError where `scores_under` cannot have the measures of `report: risk`."""
        raise UserError(f"report: risk: the run '{self.folder}' has no class probabilities; name a run of multitask.")

    @abstractmethod
    def check_conditions(self, attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig]) -> None:
        """Raise UserError for attacks and corruptions that `scores_under` cannot take."""

    @abstractmethod
    def scores_under(
        self,
        net: Callable[[], Net],
        training: Training,
        split: str,
        attacks: Sequence[AttackConfig],
        corruptions: Sequence[CorruptionConfig],
        records: Path,
        *,
        risk: bool = False,
    ) -> list[Score]:
        """Return every measure on the run's own images, clean and under each attack and corruption.

        net: returns the evaluated net, asked for where something is not on record. records: the folder of records.
        risk: whether the measures of `report: risk` are among them.
        """
