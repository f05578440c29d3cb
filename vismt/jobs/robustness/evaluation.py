"""Evaluation of a robustness run: a record for every image, scores with Wilson's intervals, mean corruption errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vismt.base import ranks
from vismt.data.names import row_name
from vismt.engine.log import record_stem
from vismt.jobs.risk import Thresholds, fit_thresholds, image_measures
from vismt.jobs.robustness.data import Batches
from vismt.jobs.robustness.models import Classifier
from vismt.jobs.variants import kept
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.corruptions import mean_corruption_error
from vismt.robustness.evaluate import accuracies, evaluate_examples
from vismt.uncertainty.intervals import LOWER, Condition, Measure, wilson

TASK = "robustness"
ACCURACY = "accuracy"
CORRUPTION_ERROR = "mean corruption error"
ALL_CORRUPTIONS = Condition("all corruptions", "variant", "corruptions")


def records_path(folder: Path, data: str) -> Path:
    """Return the file with a classifier's answers on a set; folder: of the classifier."""
    return folder / "records" / f"{record_stem('answers', row_name(data), 'images')}.jsonl"


def score_set(
    classifier: Classifier,
    batches: Batches,
    specs: Sequence[DirectPerturbation],
    *,
    folder: Path,
    data: str,
    arm: str,
    calibration: Batches | None = None,
) -> list[Score]:
    """Return the accuracy on one set, clean and under each spec; images on record are not evaluated again.

    calibration: images for the thresholds of `report: risk`, whose measures are then among the scores.
    """
    path = records_path(folder, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    thresholds = None if calibration is None else _thresholds(classifier, calibration, folder, data)
    rows = evaluate_examples(
        classifier.net,
        batches,
        specs,
        num_classes=classifier.num_classes,
        quantile=None if thresholds is None else thresholds.quantile,
        records=path,
        data=data,
        fingerprint=classifier.fingerprint(),
        label=f"{arm} on {row_name(data)}",
    )
    measures = []
    for condition, values in accuracies(rows, specs, classifier.num_classes):
        interval = wilson(round(sum(values.values())), len(values))
        chance = 1 / classifier.num_classes
        measures.append((condition, Measure(ACCURACY, values, counts=True, bounds=interval, chance=chance)))
    if thresholds is not None:
        measures += image_measures(rows, specs, classifier.num_classes, thresholds)
    protocol = f"one of {classifier.num_classes} classes"
    return [Score(TASK, row_name(data), protocol, measure, condition) for condition, measure in measures]


def _thresholds(classifier: Classifier, images: Batches, folder: Path, data: str) -> Thresholds:
    """Return the thresholds of a classifier from clean images, kept in its folder."""

    @torch.no_grad()
    def fit() -> Thresholds:
        device = next((parameter.device for parameter in classifier.net.parameters()), None)
        pairs = [(classifier.net(pixels.to(device)).cpu().double(), labels) for pixels, labels, _ in images]
        logits, labels = (torch.cat(parts) for parts in zip(*pairs))
        return fit_thresholds(classifier.fingerprint(), logits.log_softmax(1), labels)

    path = folder / f"{record_stem('risk', row_name(data), 'images')}.json"
    return ranks.from_first(lambda: kept(path, Thresholds, classifier.fingerprint(), fit))


def corruption_errors(scores: Mapping[str, Sequence[Score]]) -> dict[str, list[Score]]:
    """Return by arm the mean corruption error on each set, image by image; every corruption has the same weight."""
    errors: dict[str, list[Score]] = {}
    for arm, arm_scores in scores.items():
        groups: dict[tuple[str, str, str], list[Score]] = {}
        for score in arm_scores:
            if score.condition.kind == "corruption" and score.measure.metric == ACCURACY:
                groups.setdefault((score.task, score.data, score.protocol), []).append(score)
        for corrupted in groups.values():
            values = {}
            for name in corrupted[0].measure.values:
                wrong: dict[str, dict[int, float]] = {}
                for score in corrupted:
                    by_severity = wrong.setdefault(score.condition.family, {})
                    by_severity[int(score.condition.level or 0)] = 1 - score.measure.values[name]
                values[name] = mean_corruption_error(wrong)
            measure = Measure(CORRUPTION_ERROR, values, better=LOWER)
            errors.setdefault(arm, []).append(replace(corrupted[0], measure=measure, condition=ALL_CORRUPTIONS))
    return errors
