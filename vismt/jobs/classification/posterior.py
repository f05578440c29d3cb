"""Scores of a Laplace approximation around the head of a trained net (vismt/uncertainty/laplace.py), on clean images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console
from vismt.data.batching import Gathered, InOrder
from vismt.engine import runtime
from vismt.engine.study import Training
from vismt.jobs.classification.evaluation import Evaluation, form_measures
from vismt.jobs.classification.models import PixelNet, stored
from vismt.jobs.variants import LAPLACE
from vismt.multitask.nets import TaskClassifier
from vismt.report.results import Score
from vismt.robustness.evaluate import evaluate_examples
from vismt.uncertainty.intervals import CLEAN, Measure
from vismt.uncertainty.laplace import STRUCTURES
from vismt.uncertainty.last_layers import laplace_head


def laplace_scores(evaluation: Evaluation, net: PixelNet, training: Training, records: Path) -> list[Score]:
    """Return accuracy, ECE, NLL and Brier of every task with the approximation in place of the head.

    Arguments as in `Evaluation.scores`.
    """
    data, settings = evaluation.data, evaluation.config.evaluate
    posterior = laplace_net(evaluation, net, f"{training.arm} seed {training.seed}")
    structure = next(name for name, kind in STRUCTURES.items() if isinstance(posterior.head.curvature, kind))
    scores = []
    for number, task in enumerate(data.union.tasks):
        with stored(data.part(number, settings.split)) as images:
            rows = evaluate_examples(
                TaskClassifier(posterior, data.union, number, False).eval(),
                InOrder(images, settings.batch),
                [],
                num_classes=data.union.num_classes,
                forms={CLEAN.label: lambda logits: logits},
                records=records / f"{settings.split}-{task}-laplace.jsonl",
                data=f"{task}:{settings.split}",
                fingerprint=posterior.fingerprint(),
                label=f"{task} {training.arm} seed {training.seed}, Laplace",
            )
        right = Measure("accuracy", {row["id"]: float(row["clean"] == row["label"]) for row in rows})
        text = f"{settings.split} images, one of {data.union.num_classes} classes"
        scores += [
            Score("classification", task, text, measure, LAPLACE[structure])
            for measure in (right, *form_measures(rows, CLEAN.label))
        ]
    return scores


@torch.no_grad()
def laplace_net(evaluation: Evaluation, net: PixelNet, label: str) -> PixelNet:
    """Return a copy of a net whose head is the approximation, fitted to all training images and tuned on validation images."""
    data, batch = evaluation.data, evaluation.config.evaluate.batch
    device = runtime.processes().device

    def features(images: Gathered, what: str) -> Iterator[Tensor]:
        with stored(images) as marked:
            batches = InOrder(marked, batch)
            for part, _, _ in console.track(batches, "eval", f"{what} for Laplace of {label}", len(batches)):
                yield net.features(part.to(device))

    parts = [data.part(number, "validation") for number in range(len(data.union.tasks))]
    validation = torch.cat([rows for part in parts for rows in features(part, "validation images")])
    labels = torch.cat([part.labels for part in parts]).to(device)
    training = list(features(data.training(), "training images"))
    posterior = copy.deepcopy(net)
    posterior.stock.add_module("head", laplace_head(net.head, training, (validation, labels)))
    return posterior.eval().to(device)
