"""Scores of a classifier of images from a record of every image: accuracy, quality of the probabilities, risk, detection.

An accuracy's values are 1 for a right answer and 0 for a wrong one. Records are kept, and images on record are not evaluated
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.data.batching import InOrder
from vismt.engine import runtime
from vismt.jobs.output_conditions import ADJUSTED, against
from vismt.jobs.risk import Thresholds, image_measures
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import Form, ImageQuestions, Keep, accuracies
from vismt.storage.records import SHARE, Header, Records, Row
from vismt.uncertainty.features import Feature
from vismt.uncertainty.intervals import NUMBER, Condition, Measure
from vismt.uncertainty.probability_metrics import MEASURES, detection_values, example_measures

ACCURACY = "accuracy"
NEIGHBOURS, _WIDTH = 20, 0.07


def image_scores(
    net: nn.Module,
    batches: InOrder,
    specs: Sequence[DirectPerturbation],
    *,
    names: tuple[str, str, str],
    num_classes: int,
    records: Path,
    forms: Mapping[Condition, Form] | None = None,
    thresholds: Thresholds | None = None,
    features: Sequence[Feature] = (),
    trained: bool = True,
    data: str,
    fingerprint: str,
    label: str,
    keep: Keep | None = None,
) -> list[Score]:
    """Return the accuracy clean and under each condition, the quality of the probabilities of forms, and the risk.

    The net maps images in [0, 1] to logits.

    Args:
        names: task, data and protocol of the scores.
        records: the file of the records.
        forms: forms of the clean logits whose probabilities have scores, by condition; of the adjusted form the accuracy.
        thresholds: of conformal sets and selective prediction, which are then evaluated, too (risk.py).
        features: of the evaluation, whose scores are then among the scores.
        trained: whether the net is of a training; the others have the score of a guess.
        data, fingerprint, label, keep: as for `evaluate_examples`.
    """
    by_label = {condition.label: form for condition, form in (forms or {}).items()}
    quantile = None if thresholds is None else thresholds.quantile
    questions = ImageQuestions(num_classes, specs, by_label, quantile, features, keep, data)
    log = questions.records(records, fingerprint, batches.images.content)
    rows = questions.answered(net, batches, log, label)
    groups, unit = batches.groups
    measures: list[tuple[Condition, Measure]] = []
    for condition, values in accuracies(rows, specs, num_classes):
        measure = Measure(ACCURACY, values, counts=True, chance=None if trained else 1 / num_classes)
        measures.append((condition, measure))
    for condition in forms or ():
        measures += [(condition, measure) for measure in form_measures(rows, condition, groups)]
    for feature in features:
        measures += feature.measures(rows)
    if thresholds is not None:
        measures += image_measures(rows, specs, num_classes, thresholds, groups)
    return [
        Score(*names, in_groups(measure, groups, unit), condition, examples=log.examples)
        for condition, measure in measures
    ]


def in_groups(measure: Measure, groups: Mapping[str, str], unit: str) -> Measure:
    """Return a measure of examples in groups, by id; unit: what the groups are, in the plural. {} for independent examples."""
    return replace(measure, groups=groups, grouped_by=unit) if groups else measure


def form_measures(rows: Sequence[Mapping], condition: Condition, groups: Mapping[str, str]) -> list[Measure]:
    """Return the accuracy of the adjusted form of the logits, the quality of the probabilities of another, from records.

    groups: by id, or {}.
    """
    name, ids = condition.label, [row["id"] for row in rows]

    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    right = (column(name) == column("label")).double()
    if condition == ADJUSTED:
        return [Measure(ACCURACY, dict(zip(ids, right.tolist(), strict=True)), counts=True)]
    return example_measures(ids, {one.column: column(f"{name} {one.column}") for one in MEASURES}, right, groups)


@torch.no_grad()
def confidences(
    net: Callable[[Tensor], Tensor],
    batches: InOrder,
    path: Path,
    weights: str,
    protocol: Mapping[str, object],
    label: str,
) -> dict[str, float]:
    """Return the largest probability of each image by its id; images on record are not evaluated again.

    net: images -> logits. weights, protocol: of the records in `path`. label: of the progress bar.
    """
    log = Records(path, Header(weights, batches.images.content, protocol), {"confidence": SHARE})
    names = batches.images.ids
    parts = [[names[i] for i in part.tolist()] for part in batches.parts]

    def run(number: int) -> list[Row]:
        logits = net(batches[number][0].to(runtime.processes().device))
        largest = logits.double().softmax(1).amax(1).clamp_max(1).tolist()
        return [{"id": name, "confidence": value} for name, value in zip(parts[number], largest, strict=True)]

    return {row["id"]: row["confidence"] for row in log.complete(parts, run, label)}


def neighbour_classes(features: Tensor, labels: Tensor) -> Tensor:
    """Return the class (n,) of each image by its nearest others, from features (n, d) and labels (n,).

        argmax_c sum of exp(cosine / 0.07) over those of the 20 nearest other images that have class c

    This is the k-NN evaluation of DINO (arXiv 2104.14294), of each image against the others of its set.
    """
    unit, one_hot = F.normalize(features.float(), dim=1), F.one_hot(labels).float()
    found = []
    for rows in torch.arange(len(unit)).split(1024):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -math.inf
        near, places = cosines.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
        found.append(torch.einsum("bs,bsk->bk", (near / _WIDTH).exp(), one_hot[places]).argmax(1))
    return torch.cat(found)


def detection_score(
    inside: Mapping[str, float],
    outside: Mapping[str, float],
    name: str,
    names: tuple[str, str, str],
    unit: str = "images",
    contents: Sequence[str] = (),
    groups: Sequence[tuple[Mapping[str, str], str]] = (),
) -> Score:
    """Return the AUROC with which a confidence tells evaluated examples x from the examples x' of a set of other classes.

        AUROC = P(max_c p_c(x) > max_c p_c(x')) + 1/2 P(equal)

    The confidence is the maximum softmax probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136). inside, outside: by
    id. name: of the other set in rows of results. names: task, data and protocol of the score. unit: of the examples. contents:
    what tells the examples of the two sets from others, "" where that is not known. groups: of the two sets by id, with what they
    are, as `named_groups` returns them; () for independent examples.
    """
    values = detection_values(*(-torch.tensor(list(part.values()), dtype=torch.float64) for part in (inside, outside)))
    ids = [*inside, *(f"ood {image}" for image in outside)]
    measure = Measure("AUROC", dict(zip(ids, values.tolist(), strict=True)), NUMBER, chance=0.5)
    if any(by_id for by_id, _ in groups):
        (first, of_first), (second, of_second) = groups
        joined = {image: first.get(image, image) for image in inside}
        joined |= {f"ood {image}": f"ood {second.get(image, image)}" for image in outside}
        units = {of_first, of_second} - {""}
        measure = in_groups(measure, joined, units.pop() if len(units) == 1 else "groups")
    return Score(*names, measure, against(name), unit, " ".join(contents) if all(contents) else "")
