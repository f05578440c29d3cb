"""The settings of an attack, in the section of a configuration and in the attack itself.

Every configuration imports this file, so the file does not load the attacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vismt.base.norm_balls import NORMS, PIXELS
from vismt.config.sections import Count
from vismt.config.typed import Names, within


@dataclass(frozen=True)
class AttackSettings:
    """One attack and its budget, as a user writes them.

    Args:
        name: name of the attack. torchattacks:NAME takes an attack of that library.
        epsilon: radius in pixel units of [0, 1], also as '4.5/255'.
        step_size: step of pgd in the same units. null means 2.5 epsilon / steps.
        steps: number of steps. null means the attack's own.
        norm: norm of the radius.
        restarts: number of restarts. null means the attack's own.
        random_start: whether pgd starts at a random point of the ball.
    """

    name: Annotated[str, Names("vismt.robustness.attacks.attacks:KINDS")] = "pgd"
    epsilon: Annotated[float, within(0, unit=PIXELS)] | str = "4.5/255"
    step_size: float | str | None = None
    steps: Count | None = None
    norm: Annotated[str, Names(NORMS, only=True)] = "linf"
    restarts: Count | None = None
    random_start: bool = True
