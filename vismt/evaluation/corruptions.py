"""Corruptions of the evaluated images at five severities (vismt/robustness/corruptions.py): `evaluate.corruptions`."""

from __future__ import annotations

from vismt.evaluation.sections import FEATURES
from vismt.robustness.conditions import CorruptionConfig
from vismt.robustness.corruptions import CorruptionSpec
from vismt.uncertainty.features import PIXELS, Feature, Inputs


@FEATURES.register("corruptions")
class Corruptions(Feature):
    """Every corruption at every severity is a condition. The corrupted image takes the place of the clean image."""

    key, needs = "corruptions", frozenset({PIXELS})
    kind, default = list[CorruptionConfig], list
    meaning = "evaluated corruptions. In a multi-task run with `size`, all leaves out corruptions that move pixels."
    of_inputs = True

    def perturbations(self, inputs: Inputs) -> list[CorruptionSpec]:
        return [spec for of in self.section for spec in of.specs(of_maps=inputs.tasks is not None)]
