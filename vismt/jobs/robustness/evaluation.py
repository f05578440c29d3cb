"""Evaluation of a robustness run: a record for every image, scores with Wilson's intervals, errors under corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vismt.data.batching import InOrder, names_digest
from vismt.data.set_entries import row_name
from vismt.engine.log import record_stem
from vismt.jobs.image_scores import ACCURACY, image_scores, in_groups
from vismt.jobs.output_conditions import fitted_once
from vismt.jobs.risk import Thresholds, fit_thresholds
from vismt.jobs.robustness.models import Classifier
from vismt.metatune.functional import answers
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.corruptions import error_under_corruptions
from vismt.robustness.evaluate import Keep
from vismt.uncertainty.features import Feature
from vismt.uncertainty.intervals import CLEAN, LOWER, Condition, Measure

_TASK = "robustness"
CORRUPTION_ERROR = "mean error under corruptions"
ALL_CORRUPTIONS = Condition("all corruptions", "variant", "corruptions")


def records_path(folder: Path, data: str) -> Path:
    """Return the file with a classifier's answers on a set; folder: of the classifier."""
    return folder / "records" / f"{record_stem('answers', row_name(data), 'images')}.jsonl"


def score_set(
    classifier: Classifier,
    batches: InOrder,
    specs: Sequence[DirectPerturbation],
    *,
    folder: Path,
    data: str,
    arm: str,
    for_thresholds: InOrder | None = None,
    features: Sequence[Feature] = (),
    keep: Keep | None = None,
) -> list[Score]:
    """Return the scores on one set, clean and under each spec; images on record are not evaluated again.

    for_thresholds: clean images for the thresholds of `evaluate.risk`, whose measures are then among the scores.
    features: of the evaluation. keep: as for `evaluate_examples`.
    """

    @torch.no_grad()
    def fit() -> Thresholds:
        device = next((parameter.device for parameter in classifier.net.parameters()), None)
        pairs = [
            (answers(classifier.net, pixels.to(device)).cpu().double(), labels)
            for pixels, labels, _ in for_thresholds or ()
        ]
        logits, labels = (torch.cat(parts) for parts in zip(*pairs))
        return fit_thresholds(logits.log_softmax(1), labels)

    name, fingerprint, thresholds = row_name(data), classifier.fingerprint(), None
    if for_thresholds is not None:
        path = folder / f"{record_stem('risk', name, 'images')}.json"
        fitted_on = f"{fingerprint} {names_digest(for_thresholds.images)}"
        thresholds = fitted_once(path, Thresholds, fitted_on, fit, examples=for_thresholds.images.content)
    return image_scores(
        classifier.net,
        batches,
        specs,
        names=(_TASK, name, "task known" if classifier.separate else f"one of {classifier.num_classes} classes"),
        num_classes=classifier.num_classes,
        records=records_path(folder, data),
        forms={CLEAN: lambda logits: logits},
        thresholds=thresholds,
        features=features,
        trained=False,
        data=data,
        fingerprint=fingerprint,
        label=f"{arm} on {name}",
        keep=keep,
    )


def corruption_errors(scores: Mapping[str, Sequence[Score]]) -> dict[str, list[Score]]:
    """Return by arm the mean error under corruptions on each set, image by image; every corruption has the same weight."""
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
                values[name] = error_under_corruptions(wrong)
            first = corrupted[0].measure
            measure = in_groups(Measure(CORRUPTION_ERROR, values, better=LOWER), first.groups, first.grouped_by)
            errors.setdefault(arm, []).append(replace(corrupted[0], measure=measure, condition=ALL_CORRUPTIONS))
    return errors
