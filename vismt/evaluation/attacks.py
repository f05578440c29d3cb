"""Attacks of the evaluated inputs (vismt/robustness/attacks), on the evaluated model or on another one: `evaluate.attacks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vismt.base.errors import UserError
from vismt.evaluation.sections import FEATURES
from vismt.robustness.conditions import AttackConfig, Perturbation, Transfer
from vismt.uncertainty.features import PIXELS, Feature, Inputs

if TYPE_CHECKING:
    from vismt.robustness.attacks.dense_attack import DenseAttack


@FEATURES.register("attacks")
class Attacks(Feature):
    """Every attack is a condition. An answer under it has to be right when clean, too."""

    key, needs = "attacks", frozenset({PIXELS})
    kind, default = list[AttackConfig], list
    meaning = "evaluated attacks. A multi-task run with `size` has pgd on the losses of the run."
    of_inputs = True

    @property
    def models(self) -> list[str]:
        return [attack.source for attack in self.section if attack.source is not None]

    def perturbations(self, inputs: Inputs) -> Sequence[Perturbation | DenseAttack]:
        make = inputs.source
        if self.models and make is None:
            raise UserError("evaluate.attacks: source: attacks from another model are for few-shot runs; leave it out.")
        if inputs.tasks is not None:
            return [attack.dense(inputs.tasks, inputs.seed) for attack in self.section]
        # Shared: an episode's classifier is built once for all attacks.
        sources = {name: make(name) for name in dict.fromkeys(self.models)} if make is not None else {}
        specs = [attack.spec(inputs.seed) for attack in self.section]
        for spec in specs:
            spec.check_classes(inputs.classes)
        named = zip(specs, self.section, strict=True)
        return [Transfer(spec, sources[of.source]) if of.source is not None else spec for spec, of in named]
