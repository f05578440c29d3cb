"""The multi-task classification job: one adapted ViT and one head over the classes of all tasks; arms, seeds, exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt import console
from vismt.backbones import vit
from vismt.data.gather import ShuffledBatches
from vismt.data.transforms import augment
from vismt.engine import loop, multitask_models, multitask_panels, runtime
from vismt.engine.arms import Unit, arm_names, named_unit, train_arms, unit_config
from vismt.engine.conditions import AttackConfig, conditions
from vismt.engine.multitask_config import MultitaskConfig, check
from vismt.engine.multitask_data import TaskData
from vismt.engine.multitask_evaluation import Evaluation
from vismt.engine.multitask_models import PixelNet
from vismt.errors import UserError
from vismt.lowrank.account import count_parameters
from vismt.lowrank.inject import merge
from vismt.multitask.balancing import make_balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.moe_lora import set_fade
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.union import UnionObjective
from vismt.registry import adapt


class MultitaskJob:
    """Train, evaluate and merge for one run folder; each training has a folder of its own under arms/."""

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str) -> None:
        self.config, self.folder, self.hash = config, folder, config_hash
        check(config)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: the head always is."""
        return True

    @cached_property
    def data(self) -> TaskData:
        """The images of all tasks."""
        return TaskData(self.config, self.config.model.img_size or vit.create(self.config.model.name).img_size[0])

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of this folder's trainings."""
        return Evaluation(self.config, self.folder, self.hash, self.data)

    def train(self) -> dict[str, Any]:
        """Train every arm at its rate and seeds; what run.json says of the adaptation, {"arms": {arm: what was adapted}}."""
        for task in range(len(self.data.union.tasks)):  # what cannot be evaluated is said before the training, not after
            self.data.check_part(task, self.config.evaluate.split)
            if self.config.tune is not None:
                self.data.check_part(task, "validation")
        told: dict[str, Any] = {}

        def train(unit: Unit) -> None:
            told[unit.arm] = self.train_unit(unit)

        train_arms(self.config, self.folder, train, self.evaluation.validate)
        return {"arms": told}

    def train_unit(self, unit: Unit) -> dict[str, Any]:
        """Train one arm at one rate and seed, unless its folder says that it is done; what was adapted."""
        before = multitask_models.done(unit)
        if before is not None:
            console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}: done before")
            return before
        config = unit_config(self.config, unit)
        net = multitask_models.fresh(config, self.data.union.num_classes).requires_grad_(False)
        method, name = config.adapt, "head alone"
        if method is not None:
            report = adapt(
                net.vit, method.method, method.targets, method.rank, method.alpha, unit.seed, **method.options
            )
            name = f"{report.method} rank {method.rank}"
            for remark in report.skipped:
                console.stage("adapt", f"left out: {remark}")
        balanced = [p for p in net.parameters() if p.requires_grad]
        head = net.vit.head.requires_grad_(True)
        trainable, total = count_parameters(net)
        console.stage("adapt", f"{unit.arm}   {name}   {trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)")
        console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}")
        objective = self._objective(config, net, balanced or list(head.parameters()))
        accelerator = runtime.accelerator(config.train.precision, config.train.trackers, unit.folder)
        if config.train.trackers:
            accelerator.init_trackers("vismt")
        loop.train(
            objective, self._batches(config), config.train, unit.folder, self.hash, accelerator, seed=unit.seed,
            after_step=lambda step: objective.step(),
        )
        told = {
            "method": method.method if method else "head", "rank": method.rank if method else 0, "trainable": trainable,
            "total": total,
        }
        if accelerator.is_main_process:
            multitask_models.save(net, unit.folder, method is not None, told)
        accelerator.wait_for_everyone()
        if config.train.trackers:
            accelerator.end_training()
        return told

    def _objective(self, config: MultitaskConfig, net: PixelNet, balanced: Sequence[Tensor]) -> UnionObjective:
        union, fade, retain, balancer = self.data.union, None, None, None
        if config.fade is not None:
            fade = RouterFade(config.train.steps, config.fade.start, config.fade.end)
            set_fade(net, fade)
        if config.retain is not None:
            retain = QualityRetaining(union.num_classes, union.task_of_class(), **asdict(config.retain))
        if config.balancing is not None:
            balancer = make_balancer(config.balancing.method, union.tasks, **config.balancing.options)
        return UnionObjective(
            net, union, head=config.head, label_smoothing=config.label_smoothing, balancer=balancer, balanced=balanced,
            retain=retain, fade=fade,
        )

    def _batches(self, config: MultitaskConfig) -> ShuffledBatches:
        settings = config.augment
        crop = (settings.crop, 1.0) if settings.crop < 1 else None

        def change(images: Tensor, seed: int) -> Tensor:
            return augment(images, seed, crop=crop, jitter=settings.jitter, flip=settings.flip)

        return ShuffledBatches(self.data.training(), config.batch, seed=config.seed, augment=change)

    def evaluate(self, attacks: list[AttackConfig] | None = None) -> list[dict[str, Any]]:
        """Rows of every task, arm and condition; images that are on record are not evaluated again."""
        own = self.config.evaluate
        specs = conditions(own.attacks if attacks is None else attacks, own.corruptions if attacks is None else [])
        rows = self.evaluation.rows(specs, attacks is None)
        if attacks is None:
            multitask_panels.examples(self.evaluation, self.folder / multitask_panels.EXAMPLES)
            for arm in arm_names(self.config):
                multitask_panels.routers(self.evaluation, arm, self.folder / multitask_panels.ROUTERS / f"{arm}.npz")
        return rows

    def stock(self) -> nn.Module:
        """The timm model before adaptation, its head untrained."""
        return multitask_models.fresh(self.config, self.data.union.num_classes).vit

    def net(self, expert: str | None = None) -> PixelNet:
        """One arm's net ("arm" or "arm:seed") as it was trained, images in [0, 1] -> logits."""
        return multitask_models.loaded(
            self.config, named_unit(self.config, self.folder, expert), self.data.union.num_classes
        )

    def merged(self, expert: str | None = None) -> nn.Module:
        """The stock timm classifier of one arm ("arm" or "arm:seed"), its update folded in."""
        unit, net = named_unit(self.config, self.folder, expert), self.net(expert)
        return merge(net.vit) if multitask_models.adapted(unit) else net.vit

    def adapter(self, expert: str | None = None) -> Path:
        """The adapter's folder of one arm; UserError for an arm without one."""
        unit = named_unit(self.config, self.folder, expert)
        if not multitask_models.adapted(unit):
            raise UserError(f"run '{self.folder}': arm '{unit.arm}' trains the head alone and has no adapter.")
        return unit.folder / multitask_models.ADAPTER

    def about(self) -> dict[str, Any]:
        """What config.json beside merged weights says of the classes, in timm's terms."""
        return {"num_classes": self.data.union.num_classes, "label_names": self.data.label_names}


CONFIG, JOB = MultitaskConfig, MultitaskJob
