"""The dense prediction job: one adapted ViT, a head for each task, one forward for all; arms, seeds, exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt.engine.arms import Unit, arm_config, arm_names, named_unit, unit_config
from vismt.engine.study import StudyJob
from vismt.errors import UserError
from vismt.jobs.dense import models as dense_models
from vismt.jobs.dense import panels as dense_panels
from vismt.jobs.dense.config import DenseConfig, check, trained_tasks, window_of
from vismt.jobs.dense.data import DenseBatches, DenseData
from vismt.jobs.dense.evaluation import Evaluation
from vismt.jobs.dense.predict import predict_images
from vismt.multitask.dense import SEGMENTATION, DenseNet, DenseObjective
from vismt.multitask.retain_dense import DenseRetaining

NEVER_RUN = ("fc_norm.", "head_drop.", "head.")  # of a timm model whose maps are tapped


class DenseJob(StudyJob):
    """A dense head for each task."""

    def __init__(self, config: DenseConfig, folder: Path, config_hash: str) -> None:
        super().__init__(config, folder, config_hash)
        check(config)

    @cached_property
    def data(self) -> DenseData:
        """The samples of all parts."""
        return DenseData(self.config)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of this folder's trainings."""
        return Evaluation(self.config, self.folder, self.hash, self.data)

    def check_data(self) -> None:
        for part in {self.config.evaluate.split, *(["validation"] if self.config.tune is not None else [])}:
            if len(self.data.part(part)) < 2:
                raise UserError(f"data: one {part} image; an interval needs two or more.")
        if window_of(self.config) != tuple(self.config.size):
            dense_models.make_backbone(self.config, window_of(self.config))
        for arm in arm_names(self.config):
            self.batches(arm_config(self.config, arm))

    def fresh(self, config: DenseConfig) -> DenseNet:
        return dense_models.fresh(config)

    def heads(self, net: DenseNet) -> nn.Module:
        return net.heads

    def prepare(self, net: DenseNet, config: DenseConfig) -> str:
        """Adapt the timm model, or make all of it that runs trainable; the name of the method."""
        if not config.full:
            return super().prepare(net, config)
        for path, parameter in net.stock.named_parameters():
            # Several processes wait for the gradient of every trained parameter.
            parameter.requires_grad_(not path.startswith(NEVER_RUN))
        return "full"

    def objective(self, config: DenseConfig, net: DenseNet, balanced: Sequence[Tensor]) -> DenseObjective:
        tasks, retain = trained_tasks(config), None
        if config.retain is not None:
            classes = next(task.channels for task in tasks if task.name == SEGMENTATION)
            retain = DenseRetaining(classes, **asdict(config.retain))
        return DenseObjective(
            net,
            tasks,
            balancer=self.balancer(config, [task.name for task in tasks]),
            balanced=balanced,
            retain=retain,
            fade=self.fade(config, net),
        )

    def batches(self, config: DenseConfig) -> DenseBatches:
        keys = [task.key for task in trained_tasks(config)]
        return DenseBatches(
            self.data.parts["train"],
            self.data.size,
            (config.size[0], config.size[1]),
            config.batch,
            config.augment,
            keys,
            seed=config.seed,
        )

    def validate(self, unit: Unit) -> float:
        return self.evaluation.validate(unit)

    def loaded(self, unit: Unit) -> DenseNet:
        return dense_models.loaded(self.config, unit)

    def save(self, net: DenseNet, config: DenseConfig, folder: Path) -> None:
        dense_models.save(net, config, folder)

    def evaluate(self, attacks: list[Any] | None = None) -> list[dict[str, Any]]:
        """Rows of every arm, task and delta_m, and the files of the panels; trainings scored before are not evaluated again."""
        if attacks is not None:
            raise UserError("attack: attacks are for classifiers; a dense run has none. Leave it out.")
        rows = self.evaluation.rows()
        dense_panels.write_panels(self.evaluation)
        dense_panels.write_router_panels(self.evaluation)
        return rows

    def predict(self, images: Sequence[Path], target: Path, expert: str | None = None, **how: bool) -> list[Path]:
        """Pictures of one arm's predictions; how: see `predict_images`."""
        return predict_images(self.config, named_unit(self.config, self.folder, expert), images, target, **how)

    def beside(self, expert: str | None = None) -> dict[str, bytes]:
        """heads.safetensors of one arm."""
        unit = named_unit(self.config, self.folder, expert)
        return {dense_models.HEADS: dense_models.heads_file(self.loaded(unit), unit_config(self.config, unit))}

    def about(self) -> dict[str, Any]:
        """What config.json beside merged weights says besides."""
        return {"num_classes": 0, "img_size": list(self.config.size)}


CONFIG, JOB = DenseConfig, DenseJob
