"""Sections of the configurations of jobs with several tasks on one backbone, their checks, and the balancer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from vismt.base.errors import UserError, shown_value
from vismt.config.typed import Names, arguments, plain_name
from vismt.engine.study import StudyConfig, TuneConfig
from vismt.multitask.balancing.base import BALANCERS, Balancer, make_balancer

SPLITS = ("test", "validation")
Split = Annotated[str, Names(SPLITS, only=True)]
EARLIER_RETAIN = {"ema_floor": None, "weight": 1.0, "select": "all", "weighting": "task", "teacher": "bank"}


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
        reverse: KL(student || bank) instead of KL(bank || student).
    """

    ELSEWHERE: ClassVar[dict[str, str]] = dict.fromkeys(
        EARLIER_RETAIN, "It was an option of vismt's own; take a form of EMTAL's paper or of its code."
    )

    temperature: float = 2.0
    mode: Annotated[str, Names("vismt.multitask.emtal.retain:MODES")] = "fifo2"
    ema_decay: float = 0.95
    ema_init: float = 10.0
    momentum: float = 0.5
    reduction: Annotated[str, Names("vismt.multitask.emtal.retain:REDUCTIONS")] = "mean"
    reverse: bool = False

    @staticmethod
    def from_earlier(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out keys of earlier versions at their defaults."""
        return {name: value for name, value in values.items() if (name, value) not in EARLIER_RETAIN.items()}


@dataclass
class BalancingConfig:
    """How the losses of the tasks are weighed.

    Args:
        method: the balancing method.
        options: further arguments of the method.
    """

    method: Annotated[str, Names("vismt.multitask.balancing.base:BALANCERS", only=True)] = "ew"
    options: dict[str, Any] = field(default_factory=dict)


def check_adjusted(adjusts: bool, split: str) -> None:
    """Raise UserError where logits are to be adjusted, and the validation images that choose tau are the evaluated ones."""
    if adjusts and split == "validation":
        raise UserError("evaluate.adjust_logits: tau is chosen on the validation images; set evaluate.split to test.")


def check_risk_split(risk: bool, split: str) -> None:
    """Raise UserError where the thresholds of `evaluate.risk` would come from the evaluated examples."""
    if risk and split == "validation":
        raise UserError("evaluate.risk: its thresholds come from the validation examples; set evaluate.split to test.")


def halves(risk: bool, tune: TuneConfig | None) -> bool:
    """Return whether one half of the validation examples chooses rates and the other half gives thresholds."""
    return risk and tune is not None and len(tune.rates) > 1


def risk_of_report(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of a configuration with `evaluate.risk: true` for the key `report: risk` of earlier versions."""
    if "report" not in values:
        return values
    others = {key: value for key, value in values.items() if key != "report"}
    report, evaluate = values["report"], values.get("evaluate", {})
    if report not in (None, "risk"):
        raise UserError(
            f"report: {shown_value(report)} is not known; the key was risk or null, and is evaluate.risk now."
        )
    if report is None or not isinstance(evaluate, Mapping):
        return others
    return {**others, "evaluate": {"risk": True, **evaluate}}


def check_tasks(config: StudyConfig, tasks: Sequence[str]) -> None:
    """Raise UserError for names of tasks that cannot be, and where nothing trains their heads."""
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
