"""The multi-task classification job: one adapted ViT and one head over the classes of all tasks; arms, seeds, exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt.backbones import vit
from vismt.data.batching import ShuffledBatches
from vismt.data.transforms import augment
from vismt.engine.arms import Unit, arm_names
from vismt.engine.study import StudyJob
from vismt.jobs.classification import models as multitask_models
from vismt.jobs.classification import panels as multitask_panels
from vismt.jobs.classification.config import MultitaskConfig, check
from vismt.jobs.classification.data import TaskData
from vismt.jobs.classification.evaluation import Evaluation
from vismt.jobs.classification.models import PixelNet
from vismt.lowrank.inject import train_along
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.union import UnionObjective
from vismt.report.routers import ROUTERS
from vismt.robustness.conditions import AttackConfig, conditions


class MultitaskJob(StudyJob):
    """A head over the classes of all tasks, in the place of timm's."""

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str) -> None:
        super().__init__(config, folder, config_hash)
        check(config)

    @cached_property
    def data(self) -> TaskData:
        """The images of all tasks."""
        return TaskData(self.config, self.config.model.img_size or vit.create(self.config.model.name).img_size[0])

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of this folder's trainings."""
        return Evaluation(self.config, self.folder, self.hash, self.data)

    def check_data(self) -> None:
        for task in range(len(self.data.union.tasks)):
            self.data.check_part(task, self.config.evaluate.split)
            if self.config.tune is not None:
                self.data.check_part(task, "validation")

    def fresh(self, config: MultitaskConfig) -> PixelNet:
        return multitask_models.fresh(config, self.data.union.num_classes)

    def heads(self, net: PixelNet) -> nn.Module:
        return net.stock.head

    def objective(self, config: MultitaskConfig, net: PixelNet, balanced: Sequence[Tensor]) -> UnionObjective:
        union, retain = self.data.union, None
        if config.retain is not None:
            retain = QualityRetaining(union.num_classes, union.task_of_class(), **asdict(config.retain))
        return UnionObjective(
            net,
            union,
            head=config.head,
            label_smoothing=config.label_smoothing,
            balancer=self.balancer(config, union.tasks),
            balanced=balanced,
            retain=retain,
            fade=self.fade(config, net),
        )

    def batches(self, config: MultitaskConfig) -> ShuffledBatches:
        settings = config.augment
        crop = (settings.crop, 1.0) if settings.crop < 1 else None

        def change(images: Tensor, seed: int) -> Tensor:
            return augment(images, seed, crop=crop, jitter=settings.jitter, flip=settings.flip)

        return ShuffledBatches(self.data.training(), config.batch, seed=config.seed, augment=change)

    def validate(self, unit: Unit) -> float:
        return self.evaluation.validate(unit)

    def loaded(self, unit: Unit) -> PixelNet:
        return multitask_models.loaded(self.config, unit, self.data.union.num_classes)

    def save(self, net: PixelNet, config: MultitaskConfig, folder: Path) -> None:
        multitask_models.save_head(net, folder)

    def evaluate(self, attacks: list[AttackConfig] | None = None) -> list[dict[str, Any]]:
        """Rows of every task, arm and condition; images that are on record are not evaluated again."""
        own = self.config.evaluate
        specs = conditions(own.attacks if attacks is None else attacks, own.corruptions if attacks is None else [])
        rows = self.evaluation.rows(specs, attacks is None)
        if attacks is None:
            multitask_panels.examples(self.evaluation, self.folder / multitask_panels.EXAMPLES)
            for arm in arm_names(self.config):
                multitask_panels.routers(self.evaluation, arm, self.folder / ROUTERS / f"{arm}.npz")
        return rows

    def adapted(self, expert: str | None = None) -> nn.Module:
        """The stock model of one arm with its adapter; its head counts as trained along, which goes into what is exported."""
        model = super().adapted(expert)
        train_along(model, [f"head.{name}" for name, _ in model.head.named_parameters()])
        return model

    def about(self) -> dict[str, Any]:
        """What config.json beside merged weights says of the classes, in timm's terms."""
        return {"num_classes": self.data.union.num_classes, "label_names": self.data.label_names}


CONFIG, JOB = MultitaskConfig, MultitaskJob
