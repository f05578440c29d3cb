"""The dense prediction job: one adapted ViT, a head for each task, one forward for all; arms, seeds, exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt import console
from vismt.engine import dense_models, loop, runtime
from vismt.engine.arms import Unit, arm_config, arm_names, named_unit, train_arms, unit_config
from vismt.engine.dense_config import DenseConfig, check, trained_tasks
from vismt.engine.dense_data import DenseBatches, DenseData
from vismt.engine.dense_evaluation import Evaluation
from vismt.engine.multitask_models import ADAPTER, adapted, done
from vismt.errors import UserError
from vismt.lowrank.account import count_parameters
from vismt.lowrank.files import atomic_write
from vismt.lowrank.inject import merge
from vismt.multitask.balancing import make_balancer
from vismt.multitask.dense import SEGMENTATION, DenseNet, DenseObjective
from vismt.multitask.fading import RouterFade
from vismt.multitask.moe_lora import set_fade
from vismt.multitask.retain_dense import DenseRetaining
from vismt.registry import adapt

NEVER_RUN = ("fc_norm.", "head_drop.", "head.")  # of a timm model whose maps are tapped


class DenseJob:
    """Train, evaluate and merge for one run folder; each training has a folder of its own under arms/."""

    def __init__(self, config: DenseConfig, folder: Path, config_hash: str) -> None:
        self.config, self.folder, self.hash = config, folder, config_hash
        check(config)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: the heads always are."""
        return True

    @cached_property
    def data(self) -> DenseData:
        """The samples of all parts."""
        return DenseData(self.config)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of this folder's trainings."""
        return Evaluation(self.config, self.folder, self.hash, self.data)

    def train(self) -> dict[str, Any]:
        """Train every arm at its rate and seeds; what run.json says of the adaptation, {"arms": {arm: what was adapted}}."""
        # What cannot be trained or evaluated is said before the training, not after.
        for part in {self.config.evaluate.split, *(["validation"] if self.config.tune is not None else [])}:
            if len(self.data.part(part)) < 2:
                raise UserError(f"data: one {part} image; an interval needs two or more.")
        for arm in arm_names(self.config):
            self._batches(arm_config(self.config, arm))
        told: dict[str, Any] = {}

        def train(unit: Unit) -> None:
            told[unit.arm] = self.train_unit(unit)

        train_arms(self.config, self.folder, train, self.evaluation.validate)
        return {"arms": told}

    def train_unit(self, unit: Unit) -> dict[str, Any]:
        """Train one arm at one rate and seed, unless its folder says that it is done; what was adapted."""
        before = done(unit)
        if before is not None:
            console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}: done before")
            return before
        config = unit_config(self.config, unit)
        net = dense_models.fresh(config).requires_grad_(False)
        method = prepare(net, config)
        balanced = [parameter for parameter in net.vit.parameters() if parameter.requires_grad]
        trainable, total = count_parameters(net)
        console.stage(
            "adapt", f"{unit.arm}   {method}   {', '.join(net.heads)}   {trainable:,} trainable of {total:,} "
            f"({100 * trainable / total:.2f} %)"
        )
        console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}")
        objective = make_objective(net, config, balanced or list(net.heads.parameters()))
        accelerator = runtime.accelerator(config.train.precision, config.train.trackers, unit.folder)
        if config.train.trackers:
            accelerator.init_trackers("vismt")
        loop.train(
            objective, self._batches(config), config.train, unit.folder, self.hash, accelerator, seed=unit.seed,
            after_step=lambda step: objective.step(),
        )
        rank = config.adapt.rank if config.adapt else 0
        told = {"method": method, "rank": rank, "trainable": trainable, "total": total}
        if accelerator.is_main_process:
            dense_models.save(net, config, unit.folder, told)
        accelerator.wait_for_everyone()
        if config.train.trackers:
            accelerator.end_training()
        return told

    def _batches(self, config: DenseConfig) -> DenseBatches:
        keys = [task.key for task in trained_tasks(config)]
        return DenseBatches(self.data.parts["train"], self.data.size, config.batch, config.augment, keys, seed=config.seed)

    def evaluate(self, attacks: list[Any] | None = None) -> list[dict[str, Any]]:
        """Rows of every arm, task and delta_m; trainings that were scored before are not evaluated again."""
        if attacks is not None:
            raise UserError("attack: attacks are for classifiers; a dense run has none. Leave it out.")
        return self.evaluation.rows()

    def stock(self) -> nn.Module:
        """The timm model before adaptation, without a classifier."""
        return dense_models.fresh(self.config).vit

    def net(self, expert: str | None = None) -> DenseNet:
        """One arm's net ("arm" or "arm:seed") as it was trained, images in [0, 1] -> {task: logits}."""
        return dense_models.loaded(self.config, named_unit(self.config, self.folder, expert))

    def merged(self, expert: str | None = None) -> nn.Module:
        """The stock timm backbone of one arm, its update folded in; the heads are written to merged/heads.safetensors."""
        unit, net = named_unit(self.config, self.folder, expert), self.net(expert)
        stock = merge(net.vit) if adapted(unit) else net.vit
        heads = dense_models.heads_file(net, unit_config(self.config, unit))
        atomic_write(self.folder / "merged" / dense_models.HEADS, heads)
        return stock

    def adapter(self, expert: str | None = None) -> Path:
        """The adapter's folder of one arm; UserError for an arm without one."""
        unit = named_unit(self.config, self.folder, expert)
        if not adapted(unit):
            raise UserError(f"run '{self.folder}': arm '{unit.arm}' has no adapter: it trains the heads alone, or everything.")
        return unit.folder / ADAPTER

    def about(self) -> dict[str, Any]:
        """What config.json beside merged weights says besides."""
        return {"num_classes": 0, "img_size": list(self.config.size)}


def prepare(net: DenseNet, config: DenseConfig) -> str:
    """Make trainable what the configuration trains, of a net without a gradient; the name of the method."""
    method, name = config.adapt, "heads"
    if method is not None:
        report = adapt(
            net.vit, method.method, method.targets, method.rank, method.alpha, config.seed, **method.options
        )
        name = report.method
        for remark in report.skipped:
            console.stage("adapt", f"left out: {remark}")
    if config.full:
        name = "full"
        for path, parameter in net.vit.named_parameters():
            # Several processes wait for the gradient of every trained parameter.
            parameter.requires_grad_(not path.startswith(NEVER_RUN))
    net.heads.requires_grad_(True)
    return name


def make_objective(net: DenseNet, config: DenseConfig, balanced: Sequence[Tensor]) -> DenseObjective:
    """The objective of one training. balanced: the parameters whose gradients a balancer sees."""
    tasks, fade, retain, balancer = trained_tasks(config), None, None, None
    if config.fade is not None:
        fade = RouterFade(config.train.steps, config.fade.start, config.fade.end)
        set_fade(net, fade)
    if config.retain is not None:
        classes = next(task.channels for task in tasks if task.name == SEGMENTATION)
        retain = DenseRetaining(classes, **asdict(config.retain))
    if config.balancing is not None:
        balancer = make_balancer(config.balancing.method, [task.name for task in tasks], **config.balancing.options)
    return DenseObjective(net, tasks, balancer=balancer, balanced=balanced, retain=retain, fade=fade)


CONFIG, JOB = DenseConfig, DenseJob
