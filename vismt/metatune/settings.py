"""The settings of adversarial meta-tuning, fine-tuning and MAML, which configurations share with these algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vismt.base.errors import UserError
from vismt.config.typed import Checked, Names, within
from vismt.metatune.amt.input_attack import NORMS, PYRAMID, Levels

CORRUPTION, GAUSSIAN = "corruption", "gaussian"
THREATS = (*NORMS, CORRUPTION, GAUSSIAN)
PARAMETERS = ("all", "attention_scale")
AUTO = "auto"
ALGORITHMS = ("maml", "fomaml", "metasgd")
ENGINES = ("func", "learn2learn")


@dataclass(frozen=True)
class AdversaryForm(Checked):
    """The settings of both attacks without a budget.

    Args:
        steps: steps of the input attack (`pyramid_attack`).
        step_ratio: its step as a multiple of the budget.
        pyramid: its levels, each [cells a side (null for single pixels), multiplier of its change].
        weight: lambda of the loss.
        kl: order of the divergence in the loss (vismt.metatune.amt.method).
        weight_attack: form of the weight attack nu (vismt.metatune.amt.method).
        gamma: size of nu.
        support: whether prototypes are of perturbed or clean support images.
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

    epsilons: budgets in pixel units of [0, 1] (for a corruption severities, for noise standard deviations), of which each
    episode draws one; (0.0,) leaves the input attack out. norm: one of THREATS; l2 attacks single pixels whatever `pyramid`
    is. seed: of the draws and the attack's random start.
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
        lr: Adam's; 0 skips the tuning, auto chooses one for each task.
        steps: number of steps.
        parameters: all of the backbone, frozen or not, or attention_scale.
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
        algorithm: the algorithm.
        inner_lr: rate of the inner loop, its start in metasgd.
        inner_steps: steps of the inner loop.
        engine: func (torch.func) or learn2learn.
    """

    KEY: ClassVar = "meta"
    algorithm: Annotated[str, Names(ALGORITHMS, only=True)] = "maml"
    inner_lr: Annotated[float, within(above=0)] = 0.01
    inner_steps: Annotated[int, within(1)] = 5
    engine: Annotated[str, Names(ENGINES, only=True)] = "func"
