"""The sections of a multi-task classification configuration (task: multitask)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vismt.engine.arms import ArmsConfig, check_arms
from vismt.engine.conditions import AttackConfig, CorruptionConfig, check_conditions
from vismt.errors import UserError, near
from vismt.multitask.balancing import make_balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.union import HEADS

SPLITS = ("test", "validation")


@dataclass
class TaskConfig:
    """One task. train, validation, test: cards as 'name' or 'name:split', several are joined.

    validation_share, test_share: the share of each class of `train` that is kept apart where no set is named. limit: the
    largest number of training images, spread over the classes.
    """

    name: str
    train: list[str]
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test_share: float = 0.0
    validation_share: float = 0.0
    limit: int | None = None


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


@dataclass
class AugmentConfig:
    """crop: smallest area of a random crop, 1 for none; jitter: strength of colour changes; flip: left and right."""

    crop: float = 0.35
    jitter: float = 0.0
    flip: bool = True


@dataclass
class MultitaskEvaluateConfig:
    """split: 'test', or 'validation' while choosing; batch: images at a time."""

    split: str = "test"
    batch: int = 64
    attacks: list[AttackConfig] = field(default_factory=list)
    corruptions: list[CorruptionConfig] = field(default_factory=list)


@dataclass
class MultitaskConfig(ArmsConfig):
    """Several classification tasks on one backbone. head: 'union' or 'separate'; balancing: null for one mean over the batch.

    fade: null leaves routers at their start value. on_bad_sample: 'error' or 'skip' for images that cannot be decoded.
    """

    task: str = "multitask"
    tasks: list[TaskConfig] = field(default_factory=list)
    head: str = "union"
    label_smoothing: float = 0.1
    batch: int = 32
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    fade: FadeConfig | None = None
    retain: RetainConfig | None = None
    balancing: BalancingConfig | None = None
    evaluate: MultitaskEvaluateConfig = field(default_factory=MultitaskEvaluateConfig)
    on_bad_sample: str = "error"
    download: bool = False


def check(config: MultitaskConfig) -> None:
    """Values that no type can exclude, before any work is done; those of every arm, too."""
    names = [task.name for task in config.tasks]
    if not names or len(set(names)) < len(names):
        raise UserError(f"tasks: {names}; name at least one, each once.")
    for task in config.tasks:
        _check_task(task)
    if config.train is None:
        raise UserError("train: is null; the head has to be trained.")
    model = config.model
    if model.block is not None or model.pool is not None:
        raise UserError("model: block and pool must be null: the head stands where timm's does, so that timm can load it.")
    for name, value, known in (
        ("head", config.head, HEADS), ("evaluate.split", config.evaluate.split, SPLITS),
        ("on_bad_sample", config.on_bad_sample, ("error", "skip")),
    ):
        if value not in known:
            raise UserError(f"{name}: '{value}'.{near(value, known)}")
    for name, value in (("batch", config.batch), ("evaluate.batch", config.evaluate.batch)):
        if value < 1:
            raise UserError(f"{name}: {value}; it must be at least 1.")
    if not 0 < config.augment.crop <= 1 or config.augment.jitter < 0:
        raise UserError(f"augment: crop {config.augment.crop}, jitter {config.augment.jitter}; crop lies in (0, 1].")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing: {config.label_smoothing}; it lies in [0, 1).")
    if config.retain is not None:
        if config.head != "union":
            raise UserError("retain: quality retaining compares logits over the classes of all tasks; it needs head: union.")
        QualityRetaining(1, [0], **asdict(config.retain))
    if config.balancing is not None:
        make_balancer(config.balancing.method, names, **config.balancing.options)
    if config.fade is not None:
        RouterFade(max(1, config.train.steps), config.fade.start, config.fade.end)
        if config.adapt is None or config.adapt.method != "moe_lora":
            raise UserError("fade: nothing has a router to fade; set adapt.method to moe_lora, or fade to null.")
    source = next((attack.source for attack in config.evaluate.attacks if attack.source is not None), None)
    if source is not None:
        raise UserError(f"evaluate.attacks: source '{source}': attacks from another model are for few-shot runs; leave it out.")
    check_conditions(config.evaluate.attacks, config.evaluate.corruptions, 4)
    check_arms(config, check)


def _check_task(task: TaskConfig) -> None:
    if not task.name or "/" in task.name:
        raise UserError(f"tasks: '{task.name}' is no name for a task; take letters and digits.")
    if not task.train:
        raise UserError(f"tasks: {task.name}: train names no set.")
    for part, share in (("test", task.test_share), ("validation", task.validation_share)):
        named = getattr(task, part)
        if bool(named) and bool(share):
            raise UserError(f"tasks: {task.name}: both {part} and {part}_share; give one of them.")
        if part == "test" and not named and not share:
            raise UserError(f"tasks: {task.name}: nothing to test on; name a set in test, or give test_share.")
        for other in named:
            card, _, split = other.partition(":")
            for name in task.train:
                same, _, trained = name.partition(":")
                if card == same and (split == trained or not split or not trained or "all" in (split, trained)):
                    raise UserError(
                        f"tasks: {task.name}: {part} '{other}' shares images with train '{name}'; take {part}_share instead."
                    )
