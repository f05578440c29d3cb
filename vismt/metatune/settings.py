"""The settings of adversarial meta-tuning, fine-tuning and MAML, which configurations share with these algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from vismt.base.errors import UserError
from vismt.base.registry import Registry
from vismt.config.typed import Checked, Names, within
from vismt.metatune.amt.input_attack import PYRAMID, PYRAMID_NORMS, Levels

CORRUPTION, GAUSSIAN = "corruption", "gaussian"
THREATS = (*PYRAMID_NORMS, CORRUPTION, GAUSSIAN)
PARAMETERS = ("all", "attention_scale")
AUTO = "auto"
ALGORITHMS = ("maml", "fomaml", "metasgd")
ENGINES = ("func", "learn2learn")
# Classes of few-shot models that are fitted to the support of a task, in place of its prototypes.
HEADS: Registry[Any] = Registry(
    "head: no head",
    dict.fromkeys(("logistic", "ridge"), "vismt.metatune.probes.linear")
    | dict.fromkeys(("laplace", "vbll"), "vismt.metatune.probes.bayesian")
    | {"finetune": "vismt.metatune.finetuning.finetune"},
)


@dataclass(frozen=True)
class AdversaryForm(Checked):
    """The settings of both attacks without a budget.

    Args:
        steps: number of steps of the input attack (`pyramid_attack`).
        step_ratio: step of the input attack, as a multiple of the budget.
        pyramid: levels of the input attack, each [cells a side (null for single pixels), multiplier of the change].
        weight: lambda of the loss.
        kl: order of the divergence in the loss (vismt.metatune.amt.method).
        weight_attack: form of the weight attack nu (vismt.metatune.amt.method).
        gamma: size of nu.
        support: weights under which the prototypes are computed, perturbed (theta + nu) or clean (theta).
        warmup: episodes over which budget and gamma grow linearly to their full size.
    """

    KEY: ClassVar = "pool"
    steps: Annotated[int, within(1)] = 2
    step_ratio: Annotated[float, within(above=0)] = 0.5
    pyramid: Levels = PYRAMID
    weight: Annotated[float, within(0)] = 6.0
    kl: Annotated[str, Names(("clean_adv", "adv_clean"), only=True)] = "clean_adv"
    weight_attack: Annotated[str, Names(("joint", "paper", "none"), only=True)] = "joint"
    gamma: Annotated[float, within(0)] = 1e-4
    support: Annotated[str, Names(("perturbed", "clean"), only=True)] = "perturbed"
    warmup: Annotated[int, within(0)] = 0


@dataclass(frozen=True)
class Adversary(AdversaryForm):
    """The attacks on one expert.

    epsilons: Budgets in pixel units of [0, 1] (severities for a corruption, standard deviations for noise). Each episode draws
    one. (0.0,) leaves the input attack out. norm: One of THREATS. l2 attacks single pixels for any `pyramid`. seed: Seed of the
    draws and of the attack's random start.
    """

    epsilons: tuple[float, ...] = (8 / 255,)
    seed: int = 0
    norm: Annotated[str, Names(THREATS, only=True)] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilons:
            raise UserError("pool.levels: an expert has no budget; give one or more, 0 for no input attack.")


@dataclass(frozen=True)
class FineTuneSettings(Checked):
    """Settings of the fine-tuning on a task.

    Args:
        lr: learning rate of Adam. 0 skips the tuning, and auto chooses a rate for each task.
        steps: number of steps.
        parameters: parameters to tune, all (of the backbone, frozen or not) or attention_scale.
    """

    KEY: ClassVar = "finetune"
    lr: Annotated[float, within(0, 1)] | Literal["auto"] = 1e-3
    steps: Annotated[int, within(0)] = 40
    parameters: Annotated[str, Names(PARAMETERS, only=True)] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lr, str) and self.lr != AUTO:
            raise UserError(f"finetune.lr: '{self.lr}'; it must be a number from 0 to 1, or {AUTO}.")


@dataclass(frozen=True)
class MamlSettings(Checked):
    """Settings of the inner loop.

    Args:
        algorithm: maml, fomaml (first order) or metasgd (learned rates).
        inner_lr: learning rate of the inner loop. In metasgd, its start.
        inner_steps: number of steps of the inner loop.
        engine: implementation, func (torch.func) or learn2learn.
    """

    KEY: ClassVar = "meta"
    algorithm: Annotated[str, Names(ALGORITHMS, only=True)] = "maml"
    inner_lr: Annotated[float, within(above=0)] = 0.01
    inner_steps: Annotated[int, within(1)] = 5
    engine: Annotated[str, Names(ENGINES, only=True)] = "func"
