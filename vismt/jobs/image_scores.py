"""Scores of a classifier of images from a record of every image: accuracy, quality of the probabilities, risk.

An accuracy's values are 1 for a right answer and 0 for a wrong one. Records are kept, and images on record are not evaluated
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.jobs.output_conditions import ADJUSTED
from vismt.jobs.risk import Thresholds, image_measures
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import Form, RepeatableBatches, accuracies, evaluate_examples
from vismt.storage.records import recorded_settings
from vismt.uncertainty.intervals import Condition, Measure
from vismt.uncertainty.probability_metrics import binned_gaps, quality_measures

ACCURACY = "accuracy"


def image_scores(
    net: nn.Module,
    batches: RepeatableBatches,
    specs: Sequence[DirectPerturbation],
    *,
    names: tuple[str, str, str],
    num_classes: int,
    records: Path,
    forms: Mapping[Condition, Form] | None = None,
    thresholds: Thresholds | None = None,
    trained: bool = True,
    **about: Any,
) -> list[Score]:
    """Return the accuracy clean and under each condition, the quality of the probabilities of forms, and the risk.

    Args:
        net: images in [0, 1] -> logits.
        batches: of the images.
        specs: attacks and corruptions.
        names: task, data and protocol of the scores.
        num_classes: of the logits.
        records: the file of the records.
        forms: forms of the clean logits whose probabilities have scores, by condition; of the adjusted form the accuracy. Records
            that have begun without any go on without.
        thresholds: of conformal sets and selective prediction, which are then evaluated, too (risk.py).
        trained: whether the net is of a training; the others have the score of a guess.
        about: data, fingerprint and label, as for `evaluate_examples`.
    """
    records.parent.mkdir(parents=True, exist_ok=True)
    begun = recorded_settings(records)
    if begun is not None and "forms" not in begun:
        forms = {}
    by_label = {condition.label: form for condition, form in (forms or {}).items()}
    quantile = None if thresholds is None else thresholds.quantile
    rows = evaluate_examples(
        net, batches, specs, num_classes=num_classes, forms=by_label, quantile=quantile, records=records, **about
    )
    measures: list[tuple[Condition, Measure]] = []
    for condition, values in accuracies(rows, specs, num_classes):
        measure = Measure(ACCURACY, values, counts=True, chance=None if trained else 1 / num_classes)
        measures.append((condition, measure))
    for condition in forms or ():
        measures += [(condition, measure) for measure in _form_measures(rows, condition)]
    if thresholds is not None:
        measures += image_measures(rows, specs, num_classes, thresholds)
    return [Score(*names, measure, condition) for condition, measure in measures]


def _form_measures(rows: Sequence[Mapping], condition: Condition) -> list[Measure]:
    """Return the accuracy of the adjusted form of the logits, the quality of the probabilities of another, from records."""
    name, ids = condition.label, [row["id"] for row in rows]

    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    right = (column(name) == column("label")).double()
    if condition == ADJUSTED:
        return [Measure(ACCURACY, dict(zip(ids, right.tolist(), strict=True)))]
    gaps = binned_gaps(column(f"{name} confidence"), right)
    return quality_measures(ids, gaps, column(f"{name} nll"), column(f"{name} brier"))
