"""The conditions of a few-shot evaluation beside the clean one: attacks, attacks made on another model, corruptions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vismt.config import fraction
from vismt.errors import UserError, near
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec
from vismt.robustness.transfer import Source, Transfer

SEVERITIES = (1, 2, 3, 4, 5)
Condition = AttackSpec | Transfer | CorruptionSpec
_CORRUPTED = re.compile(rf"({'|'.join(CORRUPTIONS)}) ([1-5])")


@dataclass
class AttackConfig:
    """See robustness.attacks.AttackSpec; epsilon and step_size in pixels of [0, 1], also as '4.5/255'.

    source: the model on whose task classifier the images are made (a name as in evaluate.models); null: the evaluated one.
    """

    name: str = "pgd"
    epsilon: float | str = "4.5/255"
    step_size: float | str | None = None
    steps: int | None = None
    norm: str = "linf"
    random_start: bool = True
    source: str | None = None

    def spec(self, seed: int = 0) -> AttackSpec:
        """The attack with its numbers, whatever its source."""
        step = None if self.step_size is None else fraction(self.step_size, "attack.step_size")
        epsilon = fraction(self.epsilon, "attack.epsilon")
        return AttackSpec(self.name, epsilon, step, self.steps, self.norm, self.random_start, seed)


@dataclass
class CorruptionConfig:
    """See robustness.corruptions. name: one of its fifteen, or "all"; severities: some of 1 to 5."""

    name: str = "all"
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))

    def specs(self) -> list[CorruptionSpec]:
        """One for each corruption and severity."""
        if self.name != "all" and self.name not in CORRUPTIONS:
            raise UserError(f"evaluate.corruptions: '{self.name}'.{near(self.name, ('all', *CORRUPTIONS))}")
        if not self.severities:
            raise UserError(
                f"evaluate.corruptions: {self.name} has no severities; name some of 1 to 5, or leave the key out."
            )
        names = CORRUPTIONS if self.name == "all" else (self.name,)
        return [CorruptionSpec(name, severity) for name in names for severity in self.severities]


def conditions(
    attacks: Sequence[AttackConfig],
    corruptions: Sequence[CorruptionConfig],
    source: Callable[[str], Source] | None = None,
) -> list[Condition]:
    """Attacks in their order, then corruptions; `source` gives the model of an attack's source by name, where one has any."""
    made: list[Condition] = []
    sources: dict[str, Source] = {}
    for attack in attacks:
        if attack.source is None:
            made.append(attack.spec())
            continue
        if attack.source not in sources:  # shared, so that an episode's classifier is made once for all attacks
            sources[attack.source] = source(attack.source)
        made.append(Transfer(attack.spec(), sources[attack.source]))
    return [*made, *(spec for corruption in corruptions for spec in corruption.specs())]


def check_conditions(attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig], ways: int) -> None:
    """UserError for values that do not fit and for two conditions of one name, before any model is made.

    ways: the least number in an episode.
    """
    if ways < 4 and any(attack.name == "apgd_t" for attack in attacks):
        raise UserError(f"evaluate.attacks: apgd_t: its targeted loss needs 4 classes, here are {ways}: take apgd_ce.")
    texts = [f"{attack.spec()} from {attack.source}" if attack.source else str(attack.spec()) for attack in attacks]
    texts += [spec.describe() for corruption in corruptions for spec in corruption.specs()]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise UserError(
            f"evaluate: '{twice}' is asked for twice; leave one out of evaluate.attacks or evaluate.corruptions."
        )


def corruption(condition: str) -> tuple[str, int] | None:
    """(name, severity) of a corruption's text, None for any other condition."""
    found = _CORRUPTED.fullmatch(condition)
    return (found[1], int(found[2])) if found else None


def summary(values: Sequence[tuple[str, float, float]]) -> str:
    """One line of (condition, accuracy, half width) for the console; many corruptions are told by their mean."""
    corrupted = [value for condition, value, _ in values if corruption(condition)]
    few = len(corrupted) <= 3
    texts = [
        f"{name} {100 * value:.1f} ± {100 * half:.1f}" for name, value, half in values if few or not corruption(name)
    ]
    if not few:
        texts.append(f"mean of {len(corrupted)} corruptions {100 * sum(corrupted) / len(corrupted):.1f}")
    return "   ".join(texts)
