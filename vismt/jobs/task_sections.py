"""Sections of the configurations of jobs with several tasks on one backbone, their checks, and the balancer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from vismt.base.errors import UserError
from vismt.config.typed import Names, arguments, plain_name
from vismt.engine.study import StudyConfig
from vismt.multitask.balancing.base import BALANCERS, Balancer, make_balancer
from vismt.storage.files import JsonObject

_SPLITS = ("test", "validation")
Split = Annotated[str, Names(_SPLITS, only=True)]


@dataclass
class RetainConfig:
    """Quality retaining, see vismt.multitask.emtal.retain.QualityRetaining.

    Args:
        temperature: temperature of the divergence, > 0.
        mode: fifo2 keeps the last two logits of a class, ema a running mean.
    """

    temperature: float = 2.0
    mode: Annotated[str, Names("vismt.multitask.emtal.retain:MODES")] = "fifo2"


@dataclass
class BalancingConfig:
    """How the losses of the tasks are weighed.

    Args:
        method: the balancing method.
        options: further arguments of the method.
    """

    method: Annotated[str, Names("vismt.multitask.balancing.base:BALANCERS", only=True)] = "ew"
    options: JsonObject = field(default_factory=dict)


def check_tasks(config: StudyConfig, tasks: Sequence[str]) -> None:
    """Raise UserError for impossible names of tasks, and if nothing trains their heads."""
    for name in tasks:
        plain_name(name, "tasks")
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks: {list(tasks)}; name at least one, each once.")
    if config.train is None:
        raise UserError("train: is null; the heads on the backbone have to be trained.")


def make_configured_balancer(config: BalancingConfig | None, tasks: Sequence[str]) -> Balancer | None:
    """Return the balancer of a configuration, None without a balancing section."""
    if config is None:
        return None
    return make_balancer(
        config.method, tasks, **arguments(BALANCERS[config.method], config.options, "balancing", "options")
    )
