"""The sections of a multi-task classification configuration (task: multitask)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from vismt.engine.arms import ArmsConfig, check_arms
from vismt.engine.splits import PartsConfig, check_parts
from vismt.engine.study import BalancingConfig, FadeConfig, RetainConfig, check_study, check_weighing
from vismt.errors import UserError, near
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.union import HEADS
from vismt.robustness.conditions import AttackConfig, CorruptionConfig, check_conditions


@dataclass
class TaskConfig(PartsConfig):
    """One task by name; shares are of each class, a limit is spread over the classes."""

    name: str = ""


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
    for task in config.tasks:
        _check_task(task)
    names = [task.name for task in config.tasks]
    check_study(config, names)
    check_weighing(config, names)
    model = config.model
    if model.block is not None or model.pool is not None:
        raise UserError(
            "model: block and pool must be null: the head stands where timm's does, so that timm can load it."
        )
    for name, value, known in (
        ("head", config.head, HEADS),
        ("on_bad_sample", config.on_bad_sample, ("error", "skip")),
    ):
        if value not in known:
            raise UserError(f"{name}: '{value}'.{near(value, known)}")
    if not 0 < config.augment.crop <= 1 or config.augment.jitter < 0:
        raise UserError(f"augment: crop {config.augment.crop}, jitter {config.augment.jitter}; crop lies in (0, 1].")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing: {config.label_smoothing}; it lies in [0, 1).")
    if config.retain is not None:
        if config.head != "union":
            raise UserError(
                "retain: quality retaining compares logits over the classes of all tasks; it needs head: union."
            )
        QualityRetaining(1, [0], **asdict(config.retain))
    source = next((attack.source for attack in config.evaluate.attacks if attack.source is not None), None)
    if source is not None:
        raise UserError(
            f"evaluate.attacks: source '{source}': attacks from another model are for few-shot runs; leave it out."
        )
    check_conditions(config.evaluate.attacks, config.evaluate.corruptions, 4)
    check_arms(config, check)


def _check_task(task: TaskConfig) -> None:
    if not task.name or "/" in task.name:
        raise UserError(f"tasks: '{task.name}' is no name for a task; take letters and digits.")
    if not task.train:
        raise UserError(f"tasks: {task.name}: train names no set.")
    check_parts(task, f"tasks: {task.name}")
