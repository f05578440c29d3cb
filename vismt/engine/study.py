"""What jobs with arms share: the sections of their configurations, and training each arm at its rate and seeds.

A job of this kind gives the net of a configuration, what of it are heads, the objective and the batches; adapting, training,
saving, and finding one arm again are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt import console
from vismt.engine import loop, runtime, study_files
from vismt.engine.arms import (
    CHOSEN,
    ArmsConfig,
    Unit,
    arm_config,
    arm_names,
    named_unit,
    seeds,
    train_arms,
    unit_config,
)
from vismt.errors import UserError, near
from vismt.lowrank.inject import merge, record_of
from vismt.lowrank.layer_spec import factor_rank
from vismt.lowrank.memory import count_parameters
from vismt.multitask.balancing import Balancer, make_balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.moe_lora import set_fade
from vismt.registry import adapt

SPLITS = ("test", "validation")


@dataclass
class FadeConfig:
    """Between which fractions of train.steps the routers fade, see vismt.multitask.fading."""

    start: float = 0.0
    end: float = 0.5


@dataclass
class RetainConfig:
    """See vismt.multitask.retain.QualityRetaining."""

    temperature: float = 2.0
    mode: str = "fifo2"
    ema_decay: float = 0.95
    ema_init: float = 10.0
    momentum: float = 0.5
    reduction: str = "mean"
    ema_floor: float | None = None
    reverse: bool = False


@dataclass
class BalancingConfig:
    """method: of vismt.multitask.balancing.balancers(), options: its own."""

    method: str = "ew"
    options: dict[str, Any] = field(default_factory=dict)


def check_study(config: Any, tasks: Sequence[str]) -> None:
    """Values of the shared sections that no type can exclude. tasks: all names."""
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks: {list(tasks)}; name at least one, each once.")
    if config.train is None:
        raise UserError("train: is null; what stands on the backbone has to be trained.")
    if config.evaluate.split not in SPLITS:
        raise UserError(f"evaluate.split: '{config.evaluate.split}'.{near(config.evaluate.split, SPLITS)}")
    for name, value in (("batch", config.batch), ("evaluate.batch", config.evaluate.batch)):
        if value < 1:
            raise UserError(f"{name}: {value}; it must be at least 1.")


def check_weighing(config: Any, trained: Sequence[str]) -> None:
    """Balancing and fade of a configuration of several tasks. trained: the tasks that this arm trains."""
    if config.balancing is not None:
        make_balancer(config.balancing.method, trained, **config.balancing.options)
    if config.fade is not None:
        RouterFade(max(1, config.train.steps), config.fade.start, config.fade.end)
        if config.adapt is None or config.adapt.method != "moe_lora":
            raise UserError("fade: nothing has a router to fade; set adapt.method to moe_lora, or fade to null.")


class StudyJob(ABC):
    """Train, evaluate and merge for one run folder; each training has a folder of its own under arms/."""

    def __init__(self, config: ArmsConfig, folder: Path, config_hash: str) -> None:
        self.config, self.folder, self.hash = config, folder, config_hash

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: the heads always are."""
        return True

    @abstractmethod
    def check_data(self) -> None:
        """UserError for what cannot be trained or evaluated, before the training and not after."""

    @abstractmethod
    def fresh(self, config: Any) -> nn.Module:
        """The net of an arm's configuration before training; what is adapted of it is `stock`."""

    @abstractmethod
    def heads(self, net: nn.Module) -> nn.Module:
        """What of the net is always trained."""

    @abstractmethod
    def objective(self, config: Any, net: nn.Module, balanced: Sequence[Tensor]) -> nn.Module:
        """The objective with a `step()`. balanced: the parameters whose gradients a balancer sees."""

    @abstractmethod
    def batches(self, config: Any) -> loop.Batches:
        """Batch by number."""

    @abstractmethod
    def validate(self, unit: Unit) -> float:
        """A score of a training on the validation part, the higher the better."""

    @abstractmethod
    def loaded(self, unit: Unit) -> nn.Module:
        """A trained net as it was trained."""

    @abstractmethod
    def save(self, net: nn.Module, config: Any, folder: Path) -> None:
        """Write what was trained besides the adapter."""

    def train(self) -> dict[str, Any]:
        """Train every arm at its rate and seeds; what run.json says of the adaptation, {"arms": {arm: what was adapted}}."""
        self.check_data()
        self._check_arms()
        told: dict[str, Any] = {}

        def train(unit: Unit) -> None:
            told[unit.arm] = self.train_unit(unit)

        train_arms(self.config, self.folder, train, self.validate)
        return {"arms": told}

    def train_unit(self, unit: Unit) -> dict[str, Any]:
        """Train one arm at one rate and seed, unless its folder says that it is done; what was adapted."""
        before = study_files.done(unit)
        if before is not None:
            console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}: done before")
            return before
        config = unit_config(self.config, unit)
        net, method, balanced = self._adapted(config)
        trainable, total = count_parameters(net)
        rank = factor_rank(record_of(net.stock).sites) if config.adapt is not None else 0
        name = f"{method} rank {rank}" if rank else method
        console.stage(
            "adapt", f"{unit.arm}   {name}   {trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"
        )
        console.stage("train", f"{unit.arm}   lr {unit.lr:g}   seed {unit.seed}")
        objective = self.objective(config, net, balanced)
        accelerator = runtime.accelerator(config.train.precision, config.train.trackers, unit.folder)
        if config.train.trackers:
            accelerator.init_trackers("vismt")
        loop.train(
            objective,
            self.batches(config),
            config.train,
            unit.folder,
            self.hash,
            accelerator,
            seed=unit.seed,
            after_step=lambda step: objective.step(),
        )
        told = {"method": method, "rank": rank, "trainable": trainable, "total": total}
        if accelerator.is_main_process:
            self.save(net, config, unit.folder)
            study_files.finish(net, unit.folder, config.adapt is not None, told)
        accelerator.wait_for_everyone()
        if config.train.trackers:
            accelerator.end_training()
        return told

    def _adapted(self, config: Any) -> tuple[nn.Module, str, list[Tensor]]:
        """The net of an arm's configuration, ready to train, the method, and the parameters whose gradients are balanced."""
        net = self.fresh(config).requires_grad_(False)
        method = self.prepare(net, config)
        balanced = [parameter for parameter in net.parameters() if parameter.requires_grad]
        heads = self.heads(net).requires_grad_(True)
        return net, method, balanced or list(heads.parameters())

    def _check_arms(self) -> None:
        """UserError for an arm that cannot be built as it is to be trained, before any is trained and not hours into the study.

        Arms whose rate is chosen have been built before.
        """
        for arm in arm_names(self.config):
            if (self.folder / "arms" / arm / CHOSEN).exists():
                continue
            config = replace(arm_config(self.config, arm), seed=seeds(self.config)[0])
            try:
                net, _, balanced = self._adapted(config)
                if config.train.rates:
                    objective = self.objective(config, net, balanced)
                    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
                    loop.make_optimizer(trained, config.train)
            except UserError as error:
                raise UserError(f"arms.{arm}: {error}" if self.config.arms else str(error)) from error

    def prepare(self, net: nn.Module, config: Any) -> str:
        """Adapt the stock model of a net without a gradient, where the configuration says so; the name of the method."""
        method = config.adapt
        if method is None:
            return "heads"
        report = adapt(
            net.stock, method.method, method.targets, method.rank, method.alpha, config.seed, **method.options
        )
        for remark in report.skipped:
            console.stage("adapt", f"left out: {remark}")
        return report.method

    def balancer(self, config: Any, tasks: Sequence[str]) -> Balancer | None:
        """The balancer of an arm's configuration."""
        return (
            None
            if config.balancing is None
            else make_balancer(config.balancing.method, tasks, **config.balancing.options)
        )

    def fade(self, config: Any, net: nn.Module) -> RouterFade | None:
        """The schedule that the net's routers follow from here on."""
        if config.fade is None:
            return None
        fade = RouterFade(config.train.steps, config.fade.start, config.fade.end)
        set_fade(net, fade)
        return fade

    def net(self, expert: str | None = None) -> nn.Module:
        """One arm's net ("arm" or "arm:seed") as it was trained."""
        return self.loaded(named_unit(self.config, self.folder, expert))

    def merged(self, expert: str | None = None) -> nn.Module:
        """The stock model of one arm, its update folded in."""
        unit = named_unit(self.config, self.folder, expert)
        net = self.loaded(unit)
        return merge(net.stock) if study_files.adapted(unit) else net.stock

    def beside(self, expert: str | None = None) -> dict[str, bytes]:
        """Files that go with what is merged or exported of one arm, by name; none where the stock model holds everything."""
        return {}

    def adapted(self, expert: str | None = None) -> nn.Module:
        """The stock model of one arm with its adapter; UserError for an arm without one."""
        unit = named_unit(self.config, self.folder, expert)
        if not study_files.adapted(unit):
            raise UserError(
                f"run '{self.folder}': arm '{unit.arm}' has no adapter: it trains the heads alone, or everything."
            )
        return self.loaded(unit).stock
