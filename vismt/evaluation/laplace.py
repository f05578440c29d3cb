"""A Laplace approximation around the trained head (vismt/uncertainty/laplace.py): `evaluate.laplace`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vismt.evaluation.sections import FEATURES
from vismt.uncertainty.features import HEAD, VALIDATION, Feature, View
from vismt.uncertainty.intervals import Condition, Score

# By the part of the Hessian that is kept.
_LABELS = {"full": "Laplace", "kronecker": "Laplace (Kronecker)", "rows": "Laplace"}


@FEATURES.register("laplace")
class Laplace(Feature):
    """Accuracy and quality of the probabilities with the approximation in the place of the head."""

    key, needs = "laplace", frozenset({HEAD, VALIDATION})
    meaning = (
        "also evaluate with a Laplace approximation around the trained head. If a linear head has more than 4,096 weights, the "
        "approximation is Kronecker-factored, and the condition is called Laplace (Kronecker)."
    )

    def net_scores(self, views: Sequence[View]) -> list[Score]:
        from vismt.uncertainty.last_layers import laplace_head, laplace_structure

        label = _LABELS[laplace_structure(*views[0].head_shape)]
        found = [score for view in views for score in view.with_head(self.key, laplace_head)]
        return [replace(score, condition=Condition(label, "variant", "Laplace")) for score in found]
