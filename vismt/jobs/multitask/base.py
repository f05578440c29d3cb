"""What runs of squares and runs of fitted images share: tasks, objective, and options that come from images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic

from torch import Tensor

from vismt.engine.study import Training
from vismt.jobs.calibration import Calibrations
from vismt.jobs.image_job import ImageJob
from vismt.jobs.multitask.config import MultitaskConfig, check, class_loss, entry_name, inputs_of, own_parts
from vismt.jobs.task_sections import make_configured_balancer
from vismt.jobs.training_job import Net
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.nets import SEGMENTATION, Union
from vismt.multitask.objectives import WHOLE_IMAGES, MultitaskObjective, VariationalObjective
from vismt.multitask.tasks import Task
from vismt.report.comparison import CONSTANT
from vismt.robustness.conditions import AttackConfig
from vismt.uncertainty.features import Feature, Inputs
from vismt.uncertainty.intervals import Score
from vismt.uncertainty.last_layers import is_variational


class MultitaskJob(ImageJob[MultitaskConfig, Net], Generic[Net]):
    """Several tasks on one adapted backbone: arms, seeds, exact merge."""

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str) -> None:
        check(config)
        super().__init__(config, folder, config_hash)
        self.calibrations = Calibrations(folder)
        self.references = () if CONSTANT in config.arms else (CONSTANT,)

    @abstractmethod
    def trained(self, config: MultitaskConfig) -> tuple[Sequence[Task], Union, Sequence[float]]:
        """Return the tasks of maps of an arm, the label space of its whole images, and the factors of their losses."""

    @abstractmethod
    def class_counts(self, union: Union) -> list[int]:
        """Return the number of training images of each class of a label space."""

    @abstractmethod
    def calibration_images(self, config: MultitaskConfig) -> Any:
        """Return the images that the section `calibration` of an arm names, of the size that the backbone takes."""

    @abstractmethod
    def features(self, split: str, attacks: Sequence[AttackConfig] | None) -> list[Feature]:
        """Return the features that are evaluated on a split."""

    def inputs(self, seed: int = 0) -> Inputs:
        return inputs_of(self.config, seed)

    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        if training.arm in self.references:
            return self.evaluation.constant_scores(training, split) if attacks is None else []
        net, records = cache(lambda: self.final(training)), self.records(training, split, attacks)
        return self.evaluation.scores(net, training, split, records, self.inputs(), self.features(split, attacks))

    def described(self, arm: str) -> str:
        if arm in self.references:
            return (
                "the same answer for every image: the class that is most frequent in training, or the mean of the maps"
            )
        return super().described(arm)

    def trained_on(self, config: MultitaskConfig) -> str:
        if config.merge is not None:
            return ""
        own = own_parts(config)
        names = [name for name in map(entry_name, config.tasks) if name in (config.trained_tasks or [name])]
        shared = [config.data] if any(name not in own for name in names) else []
        return ", ".join(
            name for parts in (*shared, *(own[name] for name in names if name in own)) for name in parts.train
        )

    def calibrated(self, net: Net, config: MultitaskConfig) -> MultitaskConfig:
        """Return the configuration of an arm with the options that its method computes from images."""
        section = config.calibration
        if config.adapt is None or section is None:
            return config
        backbone: Any = net.get_submodule("backbone")
        settings = self.calibrations.on_images(backbone, config.adapt, section, self.calibration_images(config))
        return replace(config, adapt=settings)

    def prepare(self, net: Net, config: MultitaskConfig) -> str:
        return super().prepare(net, self.calibrated(net, config))

    def objective(self, config: MultitaskConfig, net: Net, balanced: Sequence[Tensor]) -> MultitaskObjective:
        maps, union, weights = self.trained(config)
        head, retain = config.head_section, {}
        if config.retain is not None:
            options = asdict(config.retain)
            retain = {
                task.name: QualityRetaining(task.channels, **options) for task in maps if task.name == SEGMENTATION
            }
            if union.tasks and head.labels == "union":
                retain[WHOLE_IMAGES] = QualityRetaining(union.num_classes, union.task_of_class(), **options)
        names = [
            name for name in map(entry_name, config.tasks) if name in (*union.tasks, *(task.name for task in maps))
        ]
        kind = VariationalObjective if is_variational(config.head_name) else MultitaskObjective
        return kind(
            net,
            maps,
            union,
            head=head.labels,
            label_smoothing=config.label_smoothing,
            class_loss=class_loss(config, self.class_counts(union) if config.class_weights else None),
            weights=weights,
            balancer=make_configured_balancer(config.balancing, names),
            balanced=balanced,
            retain=retain,
        )
