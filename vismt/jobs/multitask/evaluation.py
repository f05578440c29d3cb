"""Evaluation of a multi-task run: scores are read from a record of every image of every training (jobs/image_scores.py).

The clean probabilities of every task have ECE, NLL and Brier score, as they are and in the forms that are fitted on the
validation images of a training:

    p = softmax(z / T_b), T_b of the task of the largest logit                (vismt/uncertainty/temperature.py)
    z - tau log pi, tau of TAUS with the best mean accuracy over the tasks    (vismt/multitask/class_loss.py)

calibration.json in the training's folder has both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console, ranks
from vismt.data.batching import Gathered, InOrder, joint_content, names_digest
from vismt.data.division import validation_parts
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Study, Training
from vismt.evaluation.sections import asked_features, divides, shown_quantile
from vismt.jobs.image_scores import ImageView, set_rows
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.models import PixelNet, replace_head, stored
from vismt.jobs.output_conditions import ADJUSTED, TAUS, TEMPERED, fitted_once
from vismt.jobs.predictions import Softmax
from vismt.multitask.class_loss import adjusted
from vismt.multitask.nets import TaskClassifier
from vismt.report.results import RECORDS
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import Form
from vismt.storage.records import Field, Header
from vismt.uncertainty.features import Answers, Feature, Fitted, MakeHead, Rows, rows_of
from vismt.uncertainty.intervals import CLEAN, Condition, Score
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
        self._with_head: tuple[str, object, PixelNet | None] = ("", None, None)

    def separate(self, training: Training) -> bool:
        """Return whether a training's net chooses among the classes of the image's task only."""
        return self.study.config_of(training).head_section.labels == "separate"

    def classifier(self, net: PixelNet, training: Training, number: int) -> TaskClassifier:
        return TaskClassifier(net, self.data.union, number, self.separate(training)).eval()

    def scores(
        self,
        net: Callable[[], PixelNet],
        training: Training,
        split: str,
        specs: Sequence[DirectPerturbation],
        records: Path,
        features: Sequence[Feature] = (),
        forms: Mapping[Condition, Form] | None = None,
    ) -> list[Score]:
        """Return the accuracy of every task, clean and under each condition, and what features ask for.

        records: the folder of records. forms: of the clean logits, whose probabilities have scores.
        """
        model, views, scores = net(), [], []
        with ExitStack() as stack:
            for number in range(len(self.data.union.tasks)):
                view = self._view(model, training, split, number, records, stack)
                scores += view.scores(specs, [feature.fitted(view) for feature in features], forms)
                views.append(view)
            return scores + [score for feature in features for score in feature.net_scores(views)]

    def _view(
        self, net: PixelNet, training: Training, split: str, number: int, records: Path, stack: ExitStack
    ) -> TaskView:
        """Return one task of a net. stack: Closes the store of its images."""
        union = self.data.union
        task = union.tasks[number]
        images = stack.enter_context(stored(self.data.part(number, split)))
        return TaskView(
            net=self.classifier(net, training, number),
            batches=InOrder(images, self.config.evaluate.batch),
            num_classes=union.num_classes,
            task=_TASK,
            data=task,
            part=f"{split} images",
            choice="task known" if self.separate(training) else f"one of {union.num_classes} classes",
            records=records / f"{split}-{task}.jsonl",
            source=f"{task}:{split}",
            fingerprint=net.fingerprint(),
            label=f"{task} {training.arm} seed {training.seed}",
            opened=lambda entry: stored(self.data.outside(entry)),
            evaluation=self,
            pixels=net,
            training=training,
            number=number,
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
            tasks = self.validation(net, training)
            logits, labels = (torch.cat(parts) for parts in zip(*tasks))
            temperatures = fit_block_temperatures(logits, labels, self.data.union.task_of_class())
            return FittedOutputs(temperatures, best_tau(tasks, self.data.class_counts()), len(labels))

        return self.fitted_once(training.folder / FITTED, FittedOutputs, net, fit)

    def fitted_once(
        self, path: Path, kind: type[Fitted], net: PixelNet, fit: Callable[[], Fitted], ending: str = ""
    ) -> Fitted:
        """Return what is fitted once for the weights of a net and the validation images of all tasks."""
        parts = [self.data.part(task, "validation") for task in range(len(self.data.union.tasks))]
        fingerprint = " ".join((net.fingerprint(), *map(names_digest, parts))) + ending
        return fitted_once(path, kind, fingerprint, fit, examples=joint_content(parts))

    def temperature_of_class(self, fitted: FittedOutputs) -> Tensor:
        """Return the temperature (C,) by which logits are divided where a class has the largest one."""
        by_task = torch.tensor(fitted.temperature, dtype=torch.float64).expand(len(self.data.union.tasks))
        return by_task[self.data.union.task_of_class()]

    def parts(self, number: int) -> tuple[Tensor, Tensor]:
        """Return masks of a task's validation images: those that choose rates and those on which features are fitted."""
        labels, groups = self.data.part(number, "validation").labels, self.data.validation_groups(number)
        return validation_parts(labels, divides(self.config.evaluate, self.config.tune), groups)

    def validation_accuracy(self, net: PixelNet, training: Training) -> float:
        """Return the mean accuracy over the tasks on the validation images that choose rates."""
        right = []
        for number, (logits, labels) in enumerate(self.validation(net, training)):
            chooses, _ = self.parts(number)
            right.append((logits.argmax(1) == labels)[chooses].double().mean())
        return float(torch.stack(right).mean())

    @torch.no_grad()
    def validation(self, net: PixelNet, training: Training) -> Outputs:
        """Return logits (n, C), float32 on the CPU, and labels (n,) of the validation images of each task, kept for one net."""
        key = f"{net.fingerprint()} {self.separate(training)}"
        if self._outputs[0] != key:
            device = runtime.processes().device
            found = []
            for number, task in enumerate(self.data.union.tasks):
                classifier = self.classifier(net, training, number)
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
        features, records = asked_features(self.config.evaluate), training.folder / RECORDS
        with ExitStack() as stack:
            views = [self._view(net, training, self.config.evaluate.split, task, records, stack) for task in numbers]
            fitted = [[feature.fitted(view) for feature in features if feature.holds_out] for view in views]
        quantiles = [shown_quantile(of) for of in (fitted if separate else [[*chain(*fitted)]])]
        return [Softmax(span, names[span], tasks[span], quantile) for span, quantile in zip(spans, quantiles)]

    def with_head(self, net: PixelNet, training: Training, make: MakeHead) -> PixelNet:
        """Return a copy of a net with another head, made from the images of the arm's tasks; the latest one is kept."""
        key, found = net.fingerprint(), self._with_head[2]
        if self._with_head[:2] != (key, make) or found is None:
            device, what = runtime.processes().device, f"{training.arm} seed {training.seed}"
            parts = [self.data.part(number, "validation") for number in range(len(self.data.union.tasks))]
            validation = torch.cat(
                [rows for part in parts for rows in self.features(net, part, f"validation of {what}")]
            )
            labels = torch.cat([part.labels for part in parts]).to(device)
            tasks = self.study.arms[training.arm].trained_tasks
            of_training = self.features(net, self.data.training(tasks), f"training images of {what}")
            found = copy.deepcopy(net)
            replace_head(found.stock, make(net.head, of_training, (validation, labels)))
            found = found.eval().to(device)
            self._with_head = (key, make, found)
        return found

    @torch.no_grad()
    def features(self, net: PixelNet, images: Gathered, label: str) -> list[Tensor]:
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


@dataclass(frozen=True, kw_only=True)
class TaskView(ImageView):
    """The images of one task of a run. pixels: the net over all tasks. number: of the task."""

    evaluation: Evaluation
    pixels: PixelNet
    training: Training
    number: int

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted]) -> Fitted:
        path, config = self.records.with_name(f"{name}-{self.data}.json"), self.evaluation.config
        ending = " half" if divides(config.evaluate, config.tune) else ""
        return self.evaluation.fitted_once(path, kind, self.pixels, fit, ending)

    def held_out(self, feature: Feature) -> Rows:
        logits, labels = self.evaluation.validation(self.pixels, self.training)[self.number]
        _, chosen = self.evaluation.parts(self.number)
        return rows_of([feature], Answers(logits[chosen].double(), labels[chosen]))

    def embedded(
        self, entry: str, name: str, fields: Mapping[str, Field], columns: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> Rows:
        images = self.evaluation.data.outside(entry)
        header = Header(self.fingerprint, images.content, {"data": row_name(entry), "images": names_digest(images)})
        label = f"{name} in {row_name(entry)}, {self.training.arm}"

        @torch.no_grad()
        def computed() -> dict[str, Tensor]:
            return columns(torch.cat(self.evaluation.features(self.pixels, images, label)).cpu(), images.labels)

        path = self.records.with_name(f"{record_stem(name, row_name(entry), self.training.arm)}.jsonl")
        return set_rows(images, path, header, fields, computed, label)

    @property
    def head_shape(self) -> tuple[str, int, int]:
        evaluation = self.evaluation
        name = evaluation.study.config_of(self.training).head_section.name
        return name, self.num_classes, self.pixels.backbone.width

    def with_head(self, name: str, make: MakeHead) -> list[Score]:
        net = self.evaluation.with_head(self.pixels, self.training, make)
        other = replace(
            self,
            net=self.evaluation.classifier(net, self.training, self.number),
            pixels=net,
            records=self.records.with_name(f"{self.records.stem}-{name}.jsonl"),
            fingerprint=net.fingerprint(),
            label=f"{self.label}, {name}",
        )
        return other.scores(forms={CLEAN: lambda logits: logits})
