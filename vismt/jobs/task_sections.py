"""Sections of the configurations of jobs with several tasks on one backbone, their checks, and the balancer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from vismt.base.errors import UserError, near
from vismt.config.typed import Names, arguments, plain_name
from vismt.engine.study import StudyConfig
from vismt.multitask.balancing.base import BALANCERS, Balancer, make_balancer

SPLITS = ("test", "validation")


@dataclass
class RetainConfig:
    """Quality retaining, see vismt.multitask.emtal.retain.QualityRetaining.

    Args:
        temperature: temperature of the divergence, > 0.
        mode: fifo2 keeps the last two logits of a class, ema a running mean.
        ema_decay: decay of the running cross-entropy of a task, in [0, 1].
        ema_init: start value of the running cross-entropy, > 0.
        momentum: momentum of mode ema, in [0, 1).
        reduction: over the samples of a batch.
        ema_floor: a task's weight is 1 / max(running cross-entropy, ema_floor); null for no floor.
        reverse: KL(student || bank) instead of KL(bank || student).
        weight: factor of the loss, >= 0.
        select: samples that the bank stores: all, correct ones, or confident ones (probability of the label above 1/2).
        weighting: one running cross-entropy for each task or each class.
        teacher: bank, or uniform, which stores nothing (a control).
    """

    temperature: float = 2.0
    mode: Annotated[str, Names("vismt.multitask.emtal.retain:MODES")] = "fifo2"
    ema_decay: float = 0.95
    ema_init: float = 10.0
    momentum: float = 0.5
    reduction: Annotated[str, Names("vismt.multitask.emtal.retain:REDUCTIONS")] = "mean"
    ema_floor: float | None = None
    reverse: bool = False
    weight: float = 1.0
    select: Annotated[str, Names("vismt.multitask.emtal.retain:SELECT")] = "all"
    weighting: Annotated[str, Names("vismt.multitask.emtal.retain:WEIGHTING")] = "task"
    teacher: Annotated[str, Names("vismt.multitask.emtal.retain:TEACHERS")] = "bank"


@dataclass
class BalancingConfig:
    """How the losses of the tasks are weighed.

    Args:
        method: the balancing method.
        options: further arguments of the method.
    """

    method: Annotated[str, Names("vismt.multitask.balancing.base:BALANCERS")] = "ew"
    options: dict[str, Any] = field(default_factory=dict)


def check_adjusted(adjusts: bool, split: str) -> None:
    """Raise UserError where logits are to be adjusted, and the validation images that choose tau are the evaluated ones."""
    if adjusts and split == "validation":
        raise UserError("evaluate.adjust_logits: tau is chosen on the validation images; set evaluate.split to test.")


def check_tasks(config: StudyConfig, tasks: Sequence[str], split: str, batches: dict[str, int]) -> None:
    """Check values that types do not exclude, in the sections that jobs with several tasks share.

    Args:
        config: of the run.
        tasks: all names.
        split: the evaluated split.
        batches: sizes of batches by key.

    Raises:
        UserError: an invalid value.
    """
    for name in tasks:
        plain_name(name, "tasks")
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks: {list(tasks)}; name at least one, each once.")
    if config.train is None:
        raise UserError("train: is null; the heads on the backbone have to be trained.")
    if split not in SPLITS:
        raise UserError(f"evaluate.split: '{split}'.{near(split, SPLITS)}")
    for name, value in batches.items():
        if value < 1:
            raise UserError(f"{name}: {value}; it must be at least 1.")


def make_configured_balancer(config: BalancingConfig | None, tasks: Sequence[str]) -> Balancer | None:
    """Return the balancer of a configuration, None without a balancing section."""
    if config is None:
        return None
    return make_balancer(
        config.method, tasks, **arguments(BALANCERS[config.method], config.options, "balancing", "options")
    )
