"""The perturbations of an evaluation: attacks, attacks computed on another model, corruptions.

Every perturbation has a `label` (its text in tables) and a `kind` ("attack" or "corruption"); `condition_of` gives the
condition under which its scores are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, overload

from vismt.base.errors import UserError, near
from vismt.config.sections import fraction
from vismt.config.typed import Names
from vismt.robustness.attacks.attacks import AttackSpec, budget_text
from vismt.robustness.attacks.dense_attack import DenseAttack
from vismt.robustness.attacks.transfer import Transfer, TransferSource
from vismt.robustness.corruptions import CORRUPTIONS, MOVING, CorruptionSpec
from vismt.uncertainty.intervals import Condition

SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTION_NAMES = ("all", *CORRUPTIONS)
# Computed on the evaluated model or on no model.
DirectPerturbation = AttackSpec | CorruptionSpec
Perturbation = DirectPerturbation | Transfer
# Of the images of a dense run.
DensePerturbation = DenseAttack | CorruptionSpec


@dataclass
class AttackConfig:
    """One attack, see vismt.robustness.attacks.attacks.AttackSpec.

    Args:
        name: the attack; torchattacks:NAME takes one of that library.
        epsilon: radius in pixel units of [0, 1], also as '4.5/255'.
        step_size: step of pgd in the same units; null for 2.5 epsilon / steps.
        steps: number of steps; null for the attack's own.
        norm: norm of the radius.
        random_start: whether pgd starts at a random point of the ball.
        source: the model on whose task classifier the images are computed (a name as in evaluate.models); null for the
            evaluated model.
        restarts: number of restarts; null for the attack's own.
        tasks: of a dense run, the tasks whose losses are raised; [] for all.
    """

    name: Annotated[str, Names("vismt.robustness.attacks.attacks:KINDS")] = "pgd"
    epsilon: float | str = "4.5/255"
    step_size: float | str | None = None
    steps: int | None = None
    norm: Annotated[str, Names("vismt.robustness.attacks.norms:NORMS")] = "linf"
    random_start: bool = True
    source: str | None = None
    restarts: int | None = None
    tasks: list[str] = field(default_factory=list)

    def spec(self, seed: int = 0) -> AttackSpec:
        """Return the attack of a classifier with its numbers, whatever its source."""
        if self.tasks:
            raise UserError(
                f"evaluate.attacks: tasks: {self.tasks}: the losses of single tasks are for dense runs; leave it out."
            )
        step = None if self.step_size is None else fraction(self.step_size, "attack.step_size")
        epsilon = fraction(self.epsilon, "attack.epsilon")
        return AttackSpec(
            self.name, epsilon, step, self.steps, self.norm, self.restarts, seed, random_start=self.random_start
        )

    def dense(self, known: Sequence[str]) -> DenseAttack:
        """Return the attack of a dense net; known: the tasks of its run."""
        if self.source is not None:
            raise UserError("evaluate.attacks: source: attacks from another model are for few-shot runs; leave it out.")
        for name in self.tasks:
            if name not in known:
                raise UserError(f"evaluate.attacks: tasks: no task '{name}'.{near(name, known)}")
        return DenseAttack(replace(self, tasks=[]).spec(), tuple(name for name in known if name in self.tasks))


@dataclass
class CorruptionConfig:
    """Corruptions of images, see vismt.robustness.corruptions.

    Args:
        name: one corruption, or all of them.
        severities: some of 1 to 5.
    """

    name: Annotated[str, Names("vismt.robustness.conditions:CORRUPTION_NAMES")] = "all"
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))

    def specs(self, *, of_maps: bool = False) -> list[CorruptionSpec]:
        """Return one spec for each corruption and severity.

        of_maps: for images with a label at each pixel, which a corruption that moves pixels makes wrong: "all" leaves it out.
        """
        if self.name not in CORRUPTION_NAMES:
            raise UserError(f"evaluate.corruptions: '{self.name}'.{near(self.name, CORRUPTION_NAMES)}")
        if not self.severities:
            raise UserError(
                f"evaluate.corruptions: {self.name} has no severities; name some of 1 to 5, or leave the key out."
            )
        if of_maps and self.name in MOVING:
            raise UserError(
                f"evaluate.corruptions: {self.name} moves pixels away from their labels; leave it out, or take all, which has "
                "the others."
            )
        names = list(CORRUPTIONS) if self.name == "all" else [self.name]
        if of_maps:
            names = [name for name in names if name not in MOVING]
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
    _check_labels([*labels, *(spec.label for corruption in corruptions for spec in corruption.specs())])


def dense_conditions(
    attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig], tasks: Sequence[str]
) -> list[DensePerturbation]:
    """Return the attacks and corruptions of a dense run with these tasks, in their order.

    Raises UserError for values that do not fit, and for two conditions with the same label.
    """
    specs: list[DensePerturbation] = [attack.dense(tasks) for attack in attacks]
    specs += [spec for corruption in corruptions for spec in corruption.specs(of_maps=True)]
    _check_labels([spec.label for spec in specs])
    return specs


def _check_labels(labels: Sequence[str]) -> None:
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise UserError(
            f"evaluate: '{repeated}' is asked for twice; leave one out of evaluate.attacks or evaluate.corruptions."
        )


def condition_of(spec: Perturbation | DenseAttack, num_classes: int | None = None) -> Condition:
    """Return what a score under a perturbation is filed under."""
    label = spec.describe(num_classes)
    if isinstance(spec, CorruptionSpec):
        return Condition(label, "corruption", spec.name, float(spec.severity))
    attack = spec if isinstance(spec, AttackSpec) else spec.spec
    ending = label.removeprefix(attack.describe(num_classes))  # the source of its images, or the tasks
    return Condition(label, "attack", f"{attack.family} {attack.norm}{ending}", attack.epsilon)


@dataclass(frozen=True)
class WorstCase:
    """The worst case over white-box attacks of one budget. attacks: their texts."""

    condition: Condition
    attacks: tuple[str, ...]


def worst_cases(specs: Sequence[Perturbation], num_classes: int | None = None) -> list[WorstCase]:
    """Return a worst case for each norm and radius with two white-box attacks or more, in the order of the attacks."""
    by_budget: dict[tuple[str, float], list[str]] = {}
    for spec in specs:
        if isinstance(spec, AttackSpec) and spec.name != "pgd_paper":
            by_budget.setdefault((spec.norm, spec.epsilon), []).append(spec.describe(num_classes))
    cases = []
    for (norm, epsilon), labels in by_budget.items():
        text = f"worst of {len(labels)} {budget_text(norm, epsilon)}"
        cases.append(WorstCase(Condition(text, "attack", f"worst {norm}", epsilon), tuple(labels)))
    return [case for case in cases if len(case.attacks) > 1]
