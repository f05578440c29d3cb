"""The perturbations of an evaluation: attacks, attacks that are computed on another model, and corruptions.

Every perturbation has a `label` (its text in tables) and a `kind` ("attack" or "corruption"). `condition_of` gives the condition
under which its scores are reported.

Attacks on another model (Papernot et al., arXiv 1605.07277) need the task classifier of that model, the source. It is built
from the same support as the classifier of the evaluated model. The images are computed again for every evaluated model, with
the same seeds. All models therefore get the same images, and the source itself gets its white-box attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.config.typed import Names
from vismt.lowrank.contexts import evaluating
from vismt.robustness.attack_settings import AttackSettings
from vismt.robustness.corruptions import CORRUPTIONS, MOVING, CorruptionSpec, Severity
from vismt.uncertainty.intervals import Condition

if TYPE_CHECKING:  # attacks are loaded when one is made: every configuration imports this file
    from vismt.metatune.protocol.episode_runner import FewShotModel
    from vismt.robustness.attacks.attacks import AttackSpec
    from vismt.robustness.attacks.dense_attack import DenseAttack

_SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTION_NAMES = ("all", *CORRUPTIONS)


class TransferSource:
    """The model on which attacks are computed, by name. `fingerprint` identifies its weights.

    The classifier of the latest support is kept, so that several attacks of one episode build it once.
    """

    def __init__(self, name: str, task: FewShotModel, fingerprint: str) -> None:
        self.name, self.fingerprint, self._task = name, fingerprint, task
        self._support: Tensor | None = None
        self._classifier: nn.Module | None = None

    def classifier(self, support: Tensor, labels: Tensor) -> nn.Module:
        """Return the source's classifier of this episode in eval mode. support: Images (s, 3, h, w) in [0, 1]. labels: (s,)."""
        # Not by identity: if the device differs from the device of the images, the support is a new copy for each attack.
        if self._classifier is None or self._support is None or not torch.equal(self._support, support):
            source = self._task if isinstance(self._task, nn.Module) else nn.Module()
            with evaluating(source):
                self._classifier, self._support = self._task.classifier(support, labels), support
        return self._classifier


@dataclass(frozen=True)
class Transfer:
    """An attack as a condition of the few-shot protocol, computed on `source` and not on the evaluated model."""

    spec: AttackSpec
    source: TransferSource
    kind: ClassVar[Literal["attack"]] = "attack"
    # Unlike a white-box attack, it gives all models the same image, but the clean image is also inside its budget.
    worst_case: ClassVar[bool] = True

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def label(self) -> str:
        """The condition's text, "PGD-10 linf 4.5/255 from frozen"."""
        return self.describe()

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`, with the parts of an AutoAttack that run on fewer than 4 classes."""
        return f"{self.spec.describe(num_classes)} from {self.source.name}"

    def settings(self) -> dict[str, object]:
        """Return the attack's fields, the source and its fingerprint, for a protocol's hash."""
        return {**self.spec.settings(), "source": self.source.name, "source_fingerprint": self.source.fingerprint}

    def prepare(self, support: Tensor, labels: Tensor) -> Callable[..., Tensor]:
        """Return the attack of one episode from its support (s, 3, h, w) in [0, 1] and labels (s,).

        All images are computed on the source to the end, for any model that is evaluated on them.
        """
        source = self.source.classifier(support, labels)
        return lambda model, images, truth, **options: self.spec.perturb(source, images, truth, **options, exhaust=True)


# Computed on the evaluated model or on no model.
DirectPerturbation: TypeAlias = "AttackSpec | CorruptionSpec"
Perturbation: TypeAlias = "AttackSpec | CorruptionSpec | Transfer"
# Of the images of a dense run.
DensePerturbation: TypeAlias = "DenseAttack | CorruptionSpec"


@dataclass(frozen=True)
class AttackConfig(AttackSettings):
    """One attack of an evaluation.

    Args:
        source: the model on whose task classifier the images are computed (a name as in evaluate.models). null means the
            evaluated model.
        tasks: tasks of a dense run whose losses are raised. [] means all tasks.
    """

    source: str | None = None
    tasks: list[str] = field(default_factory=list)

    def spec(self, seed: int = 0) -> AttackSpec:
        """Return the attack of a classifier with its numbers, without its source."""
        from vismt.robustness.attacks.attacks import AttackSpec

        if self.tasks:
            raise UserError(
                f"evaluate.attacks: tasks: {self.tasks}: the losses of single tasks are for dense runs; leave it out."
            )
        return AttackSpec(**{item.name: getattr(self, item.name) for item in fields(AttackSettings)}, seed=seed)

    def dense(self, known: Sequence[str], seed: int = 0) -> DenseAttack:
        """Return the attack of a dense net. known: Tasks of its run."""
        from vismt.robustness.attacks.dense_attack import DenseAttack

        require_known("evaluate.attacks: tasks: no task", self.tasks, known)
        return DenseAttack(replace(self, tasks=[]).spec(seed), tuple(name for name in known if name in self.tasks))


@dataclass
class CorruptionConfig:
    """Corruptions of images, see vismt.robustness.corruptions.

    Args:
        name: name of a corruption, or all.
        severities: severities from 1 to 5.
    """

    name: Annotated[str, Names(CORRUPTION_NAMES, only=True)] = "all"
    severities: list[Severity] = field(default_factory=lambda: list(_SEVERITIES))

    def specs(self, *, of_maps: bool = False) -> list[CorruptionSpec]:
        """Return one spec for each corruption and severity.

        of_maps: Whether the images have a label at each pixel. "all" then leaves out the corruption that moves pixels away from
        their labels.
        """
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


def condition_of(spec: Perturbation | DenseAttack, num_classes: int | None = None) -> Condition:
    """Return the condition under which a score under a perturbation is reported."""
    from vismt.robustness.attacks.attacks import AttackSpec

    label = spec.describe(num_classes)
    if isinstance(spec, CorruptionSpec):
        return Condition(label, "corruption", spec.name, float(spec.severity))
    attack = spec if isinstance(spec, AttackSpec) else spec.spec
    ending = label.removeprefix(attack.describe(num_classes))  # the source of its images, or the tasks
    return Condition(label, "attack", f"{attack.family} {attack.norm}{ending}", attack.epsilon)


@dataclass(frozen=True)
class WorstCase:
    """The worst case over white-box attacks of one budget. attacks: Texts of the attacks."""

    condition: Condition
    attacks: tuple[str, ...]


def worst_cases(specs: Sequence[Perturbation], num_classes: int | None = None) -> list[WorstCase]:
    """Return a worst case for each norm and radius with two white-box attacks or more, in the order of the attacks."""
    from vismt.robustness.attacks.attacks import AttackSpec, budget_text

    by_budget: dict[tuple[str, float], list[str]] = {}
    for spec in specs:
        if isinstance(spec, AttackSpec) and spec.name != "pgd_paper":
            by_budget.setdefault((spec.norm, spec.epsilon), []).append(spec.describe(num_classes))
    cases = []
    for (norm, epsilon), labels in by_budget.items():
        text = f"worst of {len(labels)} {budget_text(norm, epsilon)}"
        cases.append(WorstCase(Condition(text, "attack", f"worst {norm}", epsilon), tuple(labels)))
    return [case for case in cases if len(case.attacks) > 1]
