"""Evaluation of a multi-task run: scores are read from a record of every image of every training (jobs/image_scores.py).

The clean probabilities of every task have ECE, NLL and Brier score, as they are and in the forms that are fitted on the
validation images of a training:

    p = softmax(z / T_b), T_b of the task of the largest logit                (vismt/uncertainty/temperature.py)
    z - tau log pi, tau of TAUS with the best mean accuracy over the tasks    (vismt/multitask/class_loss.py)

calibration.json in the training's folder has both. The same scores of a Laplace approximation around the trained head
(vismt/uncertainty/laplace.py) are on clean images. Of sets of other classes there is how well the confidence of a net tells them
from the test images of each task, and what its features still tell of them, by their nearest neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.base import console, ranks
from vismt.data.batching import Gathered, InOrder, joint_content, names_digest
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Study, Training
from vismt.jobs.classification.config import MultitaskConfig
from vismt.jobs.classification.data import TaskData
from vismt.jobs.classification.models import PixelNet, replace_head, stored
from vismt.jobs.image_scores import confidences, detection_score, image_scores, in_groups, neighbour_classes
from vismt.jobs.output_conditions import ADJUSTED, LAPLACE, TAUS, TEMPERED, Fitted, fitted_once
from vismt.jobs.predictions import Softmax
from vismt.jobs.risk import Thresholds, fit_thresholds, thresholds_file, validation_parts
from vismt.jobs.task_sections import halves
from vismt.multitask.class_loss import adjusted
from vismt.multitask.nets import TaskClassifier
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import Form
from vismt.storage.lines import read_lines
from vismt.storage.records import SHARE, Header, Records, Row
from vismt.uncertainty.features import Feature
from vismt.uncertainty.intervals import CLEAN, Condition, Measure
from vismt.uncertainty.laplace import STRUCTURES
from vismt.uncertainty.last_layers import laplace_head
from vismt.uncertainty.temperature import block_tempered, fit_block_temperatures

_TASK = "classification"
FITTED = "calibration.json"
Outputs = list[tuple[Tensor, Tensor]]  # of each task: logits (n, C) and labels (n,)


@dataclass(frozen=True)
class FittedOutputs:
    """The temperatures of a net by task and the tau of its class prior, fitted on n validation images.

    temperature: of each task.
    """

    temperature: list[float]
    tau: float
    n: int


class Evaluation:
    """Scores of nets on the images of all tasks."""

    def __init__(self, study: Study[MultitaskConfig], data: TaskData) -> None:
        self.study = study
        self.config = study.config
        self.data = data
        self._outputs: tuple[str, Outputs] = ("", [])

    def separate(self, training: Training) -> bool:
        """Return whether a training's net chooses among the classes of the image's task only."""
        return self.study.config_of(training).head_section.labels == "separate"

    def _classifier(self, net: PixelNet, training: Training, number: int) -> TaskClassifier:
        return TaskClassifier(net, self.data.union, number, self.separate(training)).eval()

    def scores(
        self,
        net: Callable[[], PixelNet],
        training: Training,
        split: str,
        specs: Sequence[DirectPerturbation],
        records: Path,
        forms: Mapping[Condition, Form] | None = None,
        risk: bool = False,
        features: Sequence[Feature] = (),
    ) -> list[Score]:
        """Return the accuracy of every task, clean and under each condition, and the quality of the probabilities of forms.

        records: the folder of records. risk: whether conformal sets and selective prediction are evaluated, too
        (vismt/jobs/risk.py). features: of the evaluation.
        """
        scores, model = [], net()
        for number, task in enumerate(self.data.union.tasks):
            thresholds = self.thresholds(model, training, number) if risk else None
            path = records / f"{split}-{task}.jsonl"
            about: dict[str, Any] = {"forms": forms, "thresholds": thresholds, "features": features}
            scores += self._scores_of(model, training, split, number, path, specs, **about)
        return scores

    def _scores_of(
        self,
        net: PixelNet,
        training: Training,
        split: str,
        number: int,
        path: Path,
        specs: Sequence[DirectPerturbation] = (),
        ending: str = "",
        **about: Any,
    ) -> list[Score]:
        """Return the scores of one task, with the records in `path`. ending: of the label; about: as of `image_scores`."""
        union = self.data.union
        task = union.tasks[number]
        protocol = "task known" if self.separate(training) else f"one of {union.num_classes} classes"
        with stored(self.data.part(number, split)) as images:
            return image_scores(
                self._classifier(net, training, number),
                InOrder(images, self.config.evaluate.batch),
                specs,
                names=(_TASK, task, f"{split} images, {protocol}"),
                num_classes=union.num_classes,
                records=path,
                data=f"{task}:{split}",
                fingerprint=net.fingerprint(),
                label=f"{task} {training.arm} seed {training.seed}{ending}",
                **about,
            )

    def forms(self, net: PixelNet, training: Training, split: str) -> dict[Condition, Form]:
        """Return the evaluated versions of the logits: raw, temperature-scaled, prior-adjusted.

        The last two need validation images.
        """
        forms: dict[Condition, Form] = {CLEAN: lambda logits: logits}
        fitted = None if split == "validation" else self.fitted(net, training)
        if fitted is not None:
            of_class = self.temperature_of_class(fitted)
            forms[TEMPERED] = lambda logits: block_tempered(logits, of_class)
            if self.config.evaluate.adjust_logits:
                counts = self.data.class_counts()
                forms[ADJUSTED] = lambda logits: adjusted(logits, counts, fitted.tau)
        return forms

    # ---- what is fitted on validation images --------------------------------------------------------------------------

    def fitted(self, net: PixelNet, training: Training) -> FittedOutputs | None:
        """Return temperatures and tau of a training; None where a task has no validation images."""
        if not all(self.data.has_part(task, "validation") for task in range(len(self.data.union.tasks))):
            return None

        def fit() -> FittedOutputs:
            tasks = self._validation(net, training)
            logits, labels = (torch.cat(parts) for parts in zip(*tasks))
            temperatures = fit_block_temperatures(logits, labels, self.data.union.task_of_class())
            return FittedOutputs(temperatures, best_tau(tasks, self.data.class_counts()), len(labels))

        return self._fitted_once(training.folder / FITTED, FittedOutputs, net, fit)

    def _fitted_once(
        self, path: Path, kind: type[Fitted], net: PixelNet, fit: Callable[[], Fitted], ending: str = ""
    ) -> Fitted:
        parts = [self.data.part(task, "validation") for task in range(len(self.data.union.tasks))]
        fingerprint = " ".join((net.fingerprint(), *map(names_digest, parts))) + ending
        return fitted_once(path, kind, fingerprint, fit, examples=joint_content(parts))

    def temperature_of_class(self, fitted: FittedOutputs) -> Tensor:
        """Return the temperature (C,) by which logits are divided where a class has the largest one."""
        by_task = torch.tensor(fitted.temperature, dtype=torch.float64).expand(len(self.data.union.tasks))
        return by_task[self.data.union.task_of_class()]

    def parts(self, number: int) -> tuple[Tensor, Tensor]:
        """Return masks of a task's validation images: those that choose rates and those that give thresholds."""
        labels, groups = self.data.part(number, "validation").labels, self.data.validation_groups(number)
        return validation_parts(labels, self.config.evaluate.risk, self.config.tune, groups)

    def thresholds(self, net: PixelNet, training: Training, number: int) -> Thresholds:
        """Return the thresholds of a task, fitted on its validation images."""

        def fit() -> Thresholds:
            logits, labels = self._validation(net, training)[number]
            _, chosen = self.parts(number)
            return fit_thresholds(logits[chosen].double().log_softmax(1), labels[chosen])

        path = training.folder / thresholds_file(self.data.union.tasks[number])
        ending = " half" if halves(self.config.evaluate.risk, self.config.tune) else ""
        return self._fitted_once(path, Thresholds, net, fit, ending)

    def validation_accuracy(self, net: PixelNet, training: Training) -> float:
        """Return the mean accuracy over the tasks on the validation images that choose rates."""
        right = []
        for number, (logits, labels) in enumerate(self._validation(net, training)):
            chooses, _ = self.parts(number)
            right.append((logits.argmax(1) == labels)[chooses].double().mean())
        return float(torch.stack(right).mean())

    @torch.no_grad()
    def _validation(self, net: PixelNet, training: Training) -> Outputs:
        """Return logits (n, C), float32 on the CPU, and labels (n,) of the validation images of each task, kept for one net."""
        key = f"{net.fingerprint()} {self.separate(training)}"
        if self._outputs[0] != key:
            device = runtime.processes().device
            found = []
            for number, task in enumerate(self.data.union.tasks):
                classifier = self._classifier(net, training, number)
                with stored(self.data.part(number, "validation")) as part:
                    batches = InOrder(part, self.config.evaluate.batch)
                    pairs = [
                        (classifier(images.to(device)).float().cpu(), torch.as_tensor(labels))
                        for images, labels, _ in console.track(batches, "eval", f"validation of {task}", len(batches))
                    ]
                logits, labels = (torch.cat(parts) for parts in zip(*pairs))
                found.append((logits, labels))
            self._outputs = (key, found)
        return self._outputs[1]

    # ---- images of the user ---------------------------------------------------------------------------------------------

    def softmaxes(self, net: PixelNet, training: Training) -> list[Softmax]:
        """Return the softmaxes of a net for images of the user: one over all classes, or one for each task.

        The conformal sets of one over all classes take the largest threshold of a task, which covers the images of every task.
        """
        union, names, separate = self.data.union, self.data.label_names, self.separate(training)
        tasks = [union.tasks[task] for task in union.task_of_class().tolist()]
        numbers = range(len(union.tasks))
        spans = [union.span(task) for task in numbers] if separate else [slice(0, union.num_classes)]
        quantiles: list[float | None] = [None] * len(spans)
        if self.config.evaluate.risk:
            fitted = [self.thresholds(net, training, task).quantile for task in numbers]
            quantiles = [*fitted] if separate else [max(fitted)]
        return [Softmax(span, names[span], tasks[span], quantile) for span, quantile in zip(spans, quantiles)]

    # ---- Laplace, sets of other classes, the merge check --------------------------------------------------------------

    def laplace(self, net: PixelNet, training: Training, records: Path, trained_tasks: Sequence[str]) -> list[Score]:
        """Return accuracy, ECE, NLL and Brier of every task with a Laplace approximation in place of the head.

        trained_tasks: of the arm, on whose training images the approximation is fitted; () for all.
        """
        split, label = self.config.evaluate.split, f"{training.arm} seed {training.seed}"
        posterior = self._laplace_net(net, label, trained_tasks)
        structure = next(name for name, kind in STRUCTURES.items() if isinstance(posterior.head.curvature, kind))
        scores = []
        for number, task in enumerate(self.data.union.tasks):
            path = records / f"{split}-{task}-laplace.jsonl"
            forms: dict[Condition, Form] = {CLEAN: lambda logits: logits}
            scores += self._scores_of(posterior, training, split, number, path, ending=", Laplace", forms=forms)
        return [replace(score, condition=LAPLACE[structure]) for score in scores]

    @torch.no_grad()
    def _laplace_net(self, net: PixelNet, label: str, trained_tasks: Sequence[str]) -> PixelNet:
        """Return a copy of a net with the approximation, fitted to its training images and tuned on validation images."""
        device, what = runtime.processes().device, f"images for Laplace of {label}"
        parts = [self.data.part(number, "validation") for number in range(len(self.data.union.tasks))]
        validation = torch.cat([rows for part in parts for rows in self._features(net, part, f"validation {what}")])
        labels = torch.cat([part.labels for part in parts]).to(device)
        training = self._features(net, self.data.training(trained_tasks), f"training {what}")
        posterior = copy.deepcopy(net)
        replace_head(posterior.stock, laplace_head(net.head, training, (validation, labels)))
        return posterior.eval().to(device)

    def detection(self, net: PixelNet, training: Training, records: Path) -> list[Score]:
        """Return the AUROC of every set of evaluate.ood against the evaluated images of every task.

        Arguments as in `scores`, whose records are read.
        """
        settings, union = self.config.evaluate, self.data.union
        scores = []
        for number, task in enumerate(union.tasks):
            path = records / f"{settings.split}-{task}.jsonl"
            lines = ranks.on_first(partial(read_lines, path)) if settings.ood else []  # which has written all of it
            inside = {row["id"]: row["clean confidence"] for row in lines if "id" in row}
            for name in settings.ood:
                with stored(self.data.outside(name)) as images:
                    others = InOrder(images, settings.batch)
                    outside = confidences(
                        self._classifier(net, training, number),
                        others,
                        records / f"{record_stem('ood', task, row_name(name))}.jsonl",
                        net.fingerprint(),
                        {"data": name, "task": task},
                        f"{row_name(name)} against {task}, {training.arm} seed {training.seed}",
                    )
                protocol = f"{settings.split} images, detection"
                evaluated = InOrder(self.data.part(number, settings.split), settings.batch)
                contents, groups = [evaluated.images.content, images.content], [evaluated.groups, others.groups]
                about = (_TASK, task, protocol)
                scores.append(detection_score(inside, outside, row_name(name), about, contents=contents, groups=groups))
        return scores

    @torch.no_grad()
    def neighbours(self, net: PixelNet, training: Training, records: Path) -> list[Score]:
        """Return the k-NN accuracy of every set of evaluate.neighbours in the features of a net."""
        scores = []
        for entry in self.config.evaluate.neighbours:
            name, images = row_name(entry), self.data.outside(entry)
            header = Header(net.fingerprint(), images.content, {"data": name, "images": names_digest(images)})
            path = records / f"{record_stem('neighbours', name, training.arm)}.jsonl"
            log, label = Records(path, header, {"right": SHARE}), f"neighbours in {name}, {training.arm}"
            known = all(image in log for image in images.ids)
            found = [] if known else ranks.on_first(partial(self._neighbours, net, images, label))
            rows = log.complete([images.ids], [found].__getitem__, label)  # one batch
            right = {row["id"]: row["right"] for row in rows}
            groups = InOrder(images, self.config.evaluate.batch).groups
            measure = in_groups(Measure("k-NN accuracy", right, counts=True), *groups)
            scores.append(Score(_TASK, name, "features", measure, CLEAN, examples=log.examples))
        return scores

    def _neighbours(self, net: PixelNet, images: Gathered, label: str) -> list[Row]:
        """Return a row for each image, with 1 where its nearest neighbours have its class and 0 where they have another."""
        features = torch.cat(self._features(net, images, label)).cpu()
        right = (neighbour_classes(features, images.labels) == images.labels).double().tolist()
        return [{"id": name, "right": value} for name, value in zip(images.ids, right, strict=True)]

    def _features(self, net: PixelNet, images: Gathered, label: str) -> list[Tensor]:
        """Return the features (b, d) of each batch of images, on the device of this process."""
        device = runtime.processes().device
        with stored(images) as marked:
            batches = InOrder(marked, self.config.evaluate.batch)
            tracked = console.track(batches, "eval", label, len(batches))
            return [net.features(part.to(device)) for part, _, _ in tracked]

    @torch.no_grad()
    def outputs(self, merged: PixelNet, plain: PixelNet) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield the logits of both nets on the first batch of evaluated images of every task."""
        device, settings = runtime.processes().device, self.config.evaluate
        for number in ranks.my_share(range(len(self.data.union.tasks))):
            images = InOrder(self.data.part(number, settings.split), settings.batch)[0][0].to(device)
            yield "logits", merged(images), plain(images), True


def best_tau(tasks: Outputs, counts: Sequence[int]) -> float:
    """Return the tau with the largest mean accuracy over the tasks (ties: the smallest).

    counts: training images of each class of the union.
    """

    def score(tau: float) -> float:
        right = [(adjusted(logits, counts, tau).argmax(1) == labels).double().mean() for logits, labels in tasks]
        return float(torch.stack(right).mean())

    return max(TAUS, key=score)
