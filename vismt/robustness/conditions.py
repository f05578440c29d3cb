"""The perturbations of an evaluation: attacks, attacks computed on another model, corruptions.

Every perturbation has a `label` (its text in tables) and a `kind` ("attack" or "corruption"); `condition_of` gives the
condition under which its scores are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

from vismt.config import HASHED_IF_SET, fraction
from vismt.errors import UserError, near
from vismt.robustness.attacks import AttackSpec, budget_text
from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec
from vismt.robustness.transfer import Transfer, TransferSource
from vismt.stats import Condition

SEVERITIES = (1, 2, 3, 4, 5)
# Computed on the evaluated model or on no model.
DirectPerturbation = AttackSpec | CorruptionSpec
Perturbation = DirectPerturbation | Transfer


@dataclass
class AttackConfig:
    """See robustness.attacks.AttackSpec; epsilon and step_size in pixel units of [0, 1], also as '4.5/255'.

    source: the model on whose task classifier the images are computed (a name as in evaluate.models); null: the evaluated
    model.
    """

    name: str = "pgd"
    epsilon: float | str = "4.5/255"
    step_size: float | str | None = None
    steps: int | None = None
    norm: str = "linf"
    random_start: bool = True
    source: str | None = None
    restarts: int | None = field(default=None, metadata=HASHED_IF_SET)

    def spec(self, seed: int = 0) -> AttackSpec:
        """Return the attack with its numbers, whatever its source."""
        step = None if self.step_size is None else fraction(self.step_size, "attack.step_size")
        epsilon = fraction(self.epsilon, "attack.epsilon")
        return AttackSpec(
            self.name, epsilon, step, self.steps, self.norm, self.restarts, seed, random_start=self.random_start
        )


@dataclass
class CorruptionConfig:
    """See robustness.corruptions. name: one of its fifteen, or "all"; severities: some of 1 to 5."""

    name: str = "all"
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))

    def specs(self) -> list[CorruptionSpec]:
        """Return one spec for each corruption and severity."""
        if self.name != "all" and self.name not in CORRUPTIONS:
            raise UserError(f"evaluate.corruptions: '{self.name}'.{near(self.name, ('all', *CORRUPTIONS))}")
        if not self.severities:
            raise UserError(
                f"evaluate.corruptions: {self.name} has no severities; name some of 1 to 5, or leave the key out."
            )
        names = CORRUPTIONS if self.name == "all" else (self.name,)
        return [CorruptionSpec(name, severity) for name in names for severity in self.severities]


@overload
def conditions(
    attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig]
) -> Sequence[DirectPerturbation]: ...


@overload
def conditions(
    attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig], source: Callable[[str], TransferSource]
) -> Sequence[Perturbation]: ...


def conditions(
    attacks: Sequence[AttackConfig],
    corruptions: Sequence[CorruptionConfig],
    source: Callable[[str], TransferSource] | None = None,
) -> Sequence[Perturbation]:
    """Return the attacks in their order, then the corruptions.

    source: returns the model of an attack's source by name; needed where an attack has one.
    """
    specs: list[Perturbation] = []
    sources: dict[str, TransferSource] = {}
    for attack in attacks:
        if attack.source is None:
            specs.append(attack.spec())
            continue
        if attack.source not in sources:  # shared, so that an episode's classifier is built once for all attacks
            if source is None:
                raise UserError(
                    f"evaluate.attacks: source: '{attack.source}': attacks on another model are not available."
                )
            sources[attack.source] = source(attack.source)
        specs.append(Transfer(attack.spec(), sources[attack.source]))
    return [*specs, *(spec for corruption in corruptions for spec in corruption.specs())]


def check_conditions(attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig], ways: int) -> None:
    """Raise UserError for values that do not fit and for two conditions with the same label, before a model is built.

    ways: the least number of classes in an episode.
    """
    for attack in attacks:
        attack.spec().check_classes(ways)
    labels = [
        f"{attack.spec().label} from {attack.source}" if attack.source else attack.spec().label for attack in attacks
    ]
    labels += [spec.label for corruption in corruptions for spec in corruption.specs()]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise UserError(
            f"evaluate: '{repeated}' is asked for twice; leave one out of evaluate.attacks or evaluate.corruptions."
        )


def condition_of(spec: Perturbation, num_classes: int | None = None) -> Condition:
    """Return what a score under a perturbation is filed under."""
    label = spec.describe(num_classes)
    if isinstance(spec, CorruptionSpec):
        return Condition(label, "corruption", spec.name, float(spec.severity))
    attack = spec.spec if isinstance(spec, Transfer) else spec
    source = f" from {spec.source.name}" if isinstance(spec, Transfer) else ""
    return Condition(label, "attack", f"{attack.family} {attack.norm}{source}", attack.epsilon)


@dataclass(frozen=True)
class WorstCase:
    """The worst case over white-box attacks of one budget. attacks: their texts."""

    condition: Condition
    attacks: tuple[str, ...]


def worst_cases(specs: Sequence[Perturbation], num_classes: int | None = None) -> list[WorstCase]:
    """Return a worst case for each norm and radius with two white-box attacks or more, in the order of the attacks."""
    by_budget: dict[tuple[str, float], list[str]] = {}
    for spec in specs:
        if isinstance(spec, AttackSpec):
            by_budget.setdefault((spec.norm, spec.epsilon), []).append(spec.describe(num_classes))
    cases = []
    for (norm, epsilon), labels in by_budget.items():
        text = f"worst of {len(labels)} {budget_text(norm, epsilon)}"
        cases.append(WorstCase(Condition(text, "attack", f"worst {norm}", epsilon), tuple(labels)))
    return [case for case in cases if len(case.attacks) > 1]
