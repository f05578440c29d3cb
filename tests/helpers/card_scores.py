"""Scores of a classifier on the images of a card, as a robustness run has them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vismt.data.batching import InOrder
from vismt.evaluation.quality import Quality
from vismt.evaluation.risk import Risk
from vismt.jobs.robustness.evaluation import card_view
from vismt.jobs.robustness.models import Classifier
from vismt.uncertainty.features import Feature
from vismt.uncertainty.intervals import Score


def score_set(
    classifier: Classifier,
    batches: InOrder,
    specs: list[Any],
    *,
    folder: Path,
    fitting: InOrder | None = None,
    features: tuple[Feature, ...] = (),
    others: dict[str, Any] | None = None,
) -> list[Score]:
    """Return the scores of the card "x". fitting: images for thresholds, whose measures are then among the scores."""
    opened = lambda entry: nullcontext((others or {})[entry])  # noqa: E731  # a set of other classes
    view = card_view(classifier, batches, folder=folder, data="x", arm="a", opened=opened, fitting=fitting)
    asked = [Quality(None), *features, *([] if fitting is None else [Risk(True)])]
    return view.scores(specs, [feature.fitted(view) for feature in asked])
