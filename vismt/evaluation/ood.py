"""How well a confidence tells the evaluated examples x from the examples x' of sets of other classes: `evaluate.ood`.

    AUROC = P(max_c p_c(x) > max_c p_c(x')) + 1/2 P(equal)

The confidence is the maximum softmax probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vismt.data.set_entries import row_name
from vismt.evaluation.sections import FEATURES
from vismt.storage.records import SHARE, Field
from vismt.uncertainty.features import OUTSIDE, PROBABILITIES, Answers, Feature, Quantity, Rows
from vismt.uncertainty.intervals import NUMBER, Condition
from vismt.uncertainty.probability_metrics import detection_values, largest_probability


@FEATURES.register("ood")
class Ood(Feature):
    """The AUROC of the largest probability for each set of other classes."""

    key, needs = "ood", frozenset({PROBABILITIES, OUTSIDE})
    kind, default = list[str], list
    meaning = (
        "sets of other classes, cards or folders, or evaluated sets of texts from elsewhere: how well the largest probability "
        "tells them from the evaluated examples, as AUROC. A few-shot episode draws as many of their images as it has queries."
    )
    about = "detection"

    @property
    def sets(self) -> Sequence[str]:
        return self.section

    def settings(self) -> Mapping[str, object]:
        return {}

    def fields(self, classes: int) -> dict[str, Field]:
        return {"confidence": SHARE}

    def columns(self, answers: Answers) -> dict[str, Tensor]:
        return {"confidence": largest_probability(answers.logits.double().log_softmax(1))}

    def quantities(self) -> list[Quantity]:
        return [
            Quantity(
                Condition(f"against {row_name(entry)}", "variant", "out of distribution"),
                "AUROC",
                NUMBER,
                chance=0.5,
                outside=entry,
            )
            for entry in self.section
        ]

    def values(self, of: Quantity, rows: Rows, outside: Mapping[str, Rows]) -> Tensor:
        return detection_values(-rows.column("confidence"), -outside[of.outside].column("confidence"))
