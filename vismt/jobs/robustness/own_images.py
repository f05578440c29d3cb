"""Arms that are run folders, evaluated by their own job on their own images: several tasks, maps, and their own scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import nn

from vismt.base.errors import UserError
from vismt.jobs import open_run
from vismt.jobs.image_job import ImageJob
from vismt.jobs.robustness.config import ClassifierConfig
from vismt.jobs.task_sections import check_risk_split
from vismt.jobs.training_job import TrainingJob
from vismt.report.results import RECORDS, Score
from vismt.robustness.conditions import AttackConfig, CorruptionConfig
from vismt.robustness.quantise import quantise


class TrainedArm:
    """One training of a run folder.

    Raises UserError for a run that trains nothing, and for an unknown arm.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        run = open_run(Path(config.run or ""))
        if not isinstance(run.job, TrainingJob):
            raise UserError(f"classifier.run: '{config.run}' trains nothing; name a run of multitask or dense.")
        if not isinstance(run.job, ImageJob):
            raise UserError(
                f"classifier.run: '{config.run}': the job '{run.config.task}' has no images of its own to attack or corrupt; "
                "name a run of multitask or dense."
            )
        self.job = run.job
        self.training = run.job.study.find(config.arm)
        self.scheme = config.quantise
        self.net = cache(self._load)  # kept, as the classifiers of cards are

    @property
    def split(self) -> str:
        """The split that the run evaluates."""
        return self.job.split

    def check(self, attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig], *, risk: bool) -> None:
        """Raise UserError for attacks, corruptions and measures of risk that the run's job does not have."""
        if risk:
            check_risk_split(self.split)
            self.job.check_risk()
        self.job.check_conditions(attacks, corruptions)

    def scores(
        self,
        attacks: Sequence[AttackConfig],
        corruptions: Sequence[CorruptionConfig],
        folder: Path,
        *,
        risk: bool,
    ) -> list[Score]:
        """Return the scores on the run's own images, clean and under each attack and corruption; folder: for records."""
        split, records = self.split, folder / RECORDS
        return self.job.scores_under(self.net, self.training, split, attacks, corruptions, records, risk=risk)

    def _load(self) -> nn.Module:
        net = self.job.final(self.training)
        if self.scheme is not None:
            quantise(net, f"run '{self.training.folder}'")
        return net
