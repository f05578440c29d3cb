"""Evaluation of a multi-task run: scores are read from a record of every image of every training.

An accuracy's values are 1 for a right answer and 0 for a wrong one. The clean probabilities of every task also have ECE, NLL and
Brier score, as they are and in the forms that are fitted on the validation images (calibration.py). Records are kept in the
training's folder, and images on record are not evaluated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console, ranks
from vismt.data.batching import InOrder
from vismt.engine import runtime
from vismt.engine.study import Training
from vismt.jobs.classification.calibration import Calibration, calibration
from vismt.jobs.classification.config import MultitaskConfig
from vismt.jobs.classification.data import TaskData
from vismt.jobs.classification.models import PixelNet, stored
from vismt.jobs.risk import Thresholds, fit_thresholds, image_measures, validation_parts
from vismt.jobs.variants import ADJUSTED, TEMPERED, kept
from vismt.multitask.class_loss import adjusted
from vismt.multitask.nets import TaskClassifier
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import Form, accuracies, evaluate_examples
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import CLEAN, LOWER, NUMBER, Measure

CONDITIONS = {condition.label: condition for condition in (CLEAN, TEMPERED, ADJUSTED)}  # of the forms of the logits


class Evaluation:
    """Scores of nets on the images of all tasks."""

    def __init__(self, config: MultitaskConfig, data: TaskData) -> None:
        self.config = config
        self.data = data
        self._outputs: tuple[str, list[tuple[Tensor, Tensor]]] = ("", [])

    def scores(
        self,
        net: PixelNet,
        training: Training,
        separate: bool,
        split: str,
        specs: Sequence[DirectPerturbation],
        records: Path,
        forms: Mapping[str, Form] | None = None,
        risk: bool = False,
    ) -> list[Score]:
        """Return the accuracy of every task, clean and under each condition, and the quality of the probabilities of forms.

        separate: whether the net chooses among the classes of the image's task only. records: the folder of records. risk:
        whether conformal sets and selective prediction are evaluated, too (vismt/jobs/risk.py).
        """
        protocol = "task known" if separate else f"one of {self.data.union.num_classes} classes"
        scores = []
        for number, task in enumerate(self.data.union.tasks):
            path = records / f"{split}-{task}.jsonl"
            classifier = TaskClassifier(net, self.data.union, number, separate).eval()
            label = f"{task} {training.arm} seed {training.seed}"
            thresholds = self.thresholds(net, training, separate)[number] if risk else None
            quantile = None if thresholds is None else thresholds.quantile
            rows = self._evaluate(net, classifier, number, split, specs, forms, quantile, path, label)
            measures = [
                (condition, Measure("accuracy", values))
                for condition, values in accuracies(rows, specs, self.data.union.num_classes)
            ]
            for name in forms or ():
                measures += [(CONDITIONS[name], measure) for measure in form_measures(rows, name)]
            if thresholds is not None:
                measures += image_measures(rows, specs, self.data.union.num_classes, thresholds)
            text = f"{split} images, {protocol}"
            scores += [Score("classification", task, text, measure, condition) for condition, measure in measures]
        return scores

    def forms(self, net: PixelNet, training: Training, separate: bool, split: str) -> dict[str, Form]:
        """Return the forms of the logits that are evaluated: as they are, and those that validation images allow."""
        forms: dict[str, Form] = {CLEAN.label: lambda logits: logits}
        fitted = None if split == "validation" else self.calibration(net, training, separate)
        if fitted is not None:
            forms[TEMPERED.label] = lambda logits: logits / fitted.temperature
            if self.config.evaluate.adjust_logits:
                counts = self.data.class_counts()
                forms[ADJUSTED.label] = lambda logits: adjusted(logits, counts, fitted.tau)
        return forms

    def calibration(self, net: PixelNet, training: Training, separate: bool) -> Calibration | None:
        """Return what is fitted on the validation images of a training; None where a task has none."""
        if not all(self.data.has_part(task, "validation") for task in range(len(self.data.union.tasks))):
            return None
        return ranks.from_first(
            lambda: calibration(
                training.folder, net.fingerprint(), self.data.class_counts(), lambda: self._validation(net, separate)
            )
        )

    def parts(self, number: int) -> tuple[Tensor, Tensor]:
        """Return masks of a task's validation images: those that choose rates and those that give thresholds."""
        return validation_parts(self.data.part(number, "validation").labels, self.config.report, self.config.tune)

    def thresholds(self, net: PixelNet, training: Training, separate: bool) -> list[Thresholds]:
        """Return the thresholds of every task, fitted on its validation images."""
        halves = not bool(self.parts(0)[1].all())
        fingerprint = net.fingerprint() + (" half" if halves else "")

        def of_task(number: int) -> Thresholds:
            logits, labels = self._validation(net, separate)[number]
            _, chosen = self.parts(number)
            return fit_thresholds(fingerprint, logits[chosen].double().log_softmax(1), labels[chosen])

        def of_tasks() -> list[Thresholds]:
            paths = [training.folder / f"risk-{task}.json" for task in self.data.union.tasks]
            return [kept(path, Thresholds, fingerprint, partial(of_task, number)) for number, path in enumerate(paths)]

        return ranks.from_first(of_tasks)

    def _validation(self, net: PixelNet, separate: bool) -> list[tuple[Tensor, Tensor]]:
        """Return logits (n, C), float32 on the CPU, and labels (n,) of the validation images of each task, kept for one net."""
        key = f"{net.fingerprint()} {separate}"
        if self._outputs[0] != key:
            self._outputs = (key, self._validation_outputs(net, separate))
        return self._outputs[1]

    @torch.no_grad()
    def _validation_outputs(self, net: PixelNet, separate: bool) -> list[tuple[Tensor, Tensor]]:
        device = runtime.processes().device
        found = []
        for number, task in enumerate(self.data.union.tasks):
            classifier = TaskClassifier(net, self.data.union, number, separate).eval()
            with stored(self.data.part(number, "validation")) as part:
                batches = InOrder(part, self.config.evaluate.batch)
                pairs = [
                    (classifier(images.to(device)).float().cpu(), labels)
                    for images, labels, _ in console.track(batches, "eval", f"validation of {task}", len(batches))
                ]
            logits, labels = zip(*pairs)
            found.append((torch.cat(logits), torch.cat([torch.as_tensor(part) for part in labels])))
        return found

    def _evaluate(
        self,
        net: PixelNet,
        classifier: TaskClassifier,
        number: int,
        split: str,
        specs: Sequence[DirectPerturbation],
        forms: Mapping[str, Form] | None,
        quantile: float | None,
        path: Path,
        label: str,
    ) -> list[dict]:
        """Return the records of a task's images; those on record are not evaluated again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if forms:
            ranks.from_first(lambda: _drop_older(path))
        with stored(self.data.part(number, split)) as images:
            return evaluate_examples(
                classifier,
                InOrder(images, self.config.evaluate.batch),
                specs,
                num_classes=self.data.union.num_classes,
                forms=forms,
                quantile=quantile,
                records=path,
                data=f"{self.data.union.tasks[number]}:{split}",
                fingerprint=net.fingerprint(),
                label=label,
            )

    @torch.no_grad()
    def outputs(self, merged: PixelNet, plain: PixelNet, label: str) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield the logits of both nets on the evaluated images of every task."""
        device = runtime.processes().device
        for number, task in enumerate(self.data.union.tasks):
            batches = InOrder(self.data.part(number, self.config.evaluate.split), self.config.evaluate.batch)
            for place in console.track(ranks.own(range(len(batches))), "merge", f"{task} {label}"):
                images = batches[place][0]
                yield "logits", merged(images.to(device)), plain(images.to(device)), True


def _drop_older(path: Path) -> None:
    """Delete records of a version that kept no probabilities; their images are evaluated again."""
    lines = read_lines(path)
    if lines and "forms" not in lines[0].get("settings", {}):
        path.unlink()


def form_measures(rows: Sequence[Mapping], name: str) -> list[Measure]:
    """Return the accuracy of an adjusted form of the logits, the quality of the probabilities of another, from its records."""
    from vismt.uncertainty.probability_metrics import calibration_values  # loads torchmetrics

    ids = [row["id"] for row in rows]
    right = [float(row[name] == row["label"]) for row in rows]
    if name == ADJUSTED.label:
        return [Measure("accuracy", dict(zip(ids, right)))]
    confidences = torch.tensor([row[f"{name} confidence"] for row in rows], dtype=torch.float64)
    effects, bounds = calibration_values(confidences, torch.tensor(right, dtype=torch.float64))
    return [
        Measure("ECE-15", dict(zip(ids, effects.tolist())), better=LOWER, bounds=bounds, paired=False),
        Measure("NLL in nats", {row["id"]: row[f"{name} nll"] for row in rows}, NUMBER, LOWER),
        Measure("Brier", {row["id"]: row[f"{name} brier"] for row in rows}, NUMBER, LOWER),
    ]
