"""Evaluation of a multi-task run: scores are read from a record of every image of every training (jobs/image_scores.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vismt.base import console, ranks
from vismt.data.batching import Gathered, InOrder, joint_content, names_digest
from vismt.data.division import validation_parts
from vismt.engine import runtime
from vismt.engine.study import Study, Training
from vismt.evaluation.quality import ACCURACY, Quality
from vismt.evaluation.sections import divides, perturbations
from vismt.jobs.image_scores import ImageView
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.models import PixelNet, replace_head, stored
from vismt.jobs.predictions import Softmax
from vismt.multitask.nets import TaskClassifier
from vismt.storage.fitted import fitted_once
from vismt.uncertainty.features import Feature, Fitted, Inputs, MakeHead, Rows, Validation
from vismt.uncertainty.intervals import CLEAN, Measure, Score

_TASK = "classification"
Outputs = list[tuple[Tensor, Tensor]]  # of each task: logits (n, C) and labels (n,)


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

    def choice(self, config: MultitaskConfig) -> str:
        """Return among which classes the net of an arm chooses, as a phrase."""
        known = config.head_section.labels == "separate"
        return "task known" if known else f"one of {self.data.union.num_classes} classes"

    def classifier(self, net: PixelNet, training: Training, number: int) -> TaskClassifier:
        return TaskClassifier(net, self.data.union, number, self.separate(training)).eval()

    def scores(
        self,
        net: Callable[[], PixelNet],
        training: Training,
        split: str,
        records: Path,
        inputs: Inputs,
        features: Sequence[Feature] = (),
    ) -> list[Score]:
        """Return the accuracy of every task, clean and under each condition, and the scores of features.

        records: Folder of records. inputs: What attacks and corruptions meet.
        """
        model, views, scores, specs = net(), [], [], perturbations(features, inputs)
        with ExitStack() as stack:
            for number in range(len(self.data.union.tasks)):
                images = stack.enter_context(stored(self.data.part(number, split)))
                view = self.view(model, training, split, number, records, images)
                scores += view.scores(specs, [feature.fitted(view) for feature in features])
                views.append(view)
            return scores + [score for feature in features for score in feature.net_scores(views)]

    def constant_scores(self, training: Training, split: str) -> list[Score]:
        """Return the accuracy of the class that is most frequent in the training images of each task, as the arms are asked."""
        union, counts, scores = self.data.union, self.data.class_counts(), []
        for number, task in enumerate(union.tasks):
            images, of_task = self.data.part(number, split), union.span(number)
            right = images.labels == max(range(of_task.start, of_task.stop), key=counts.__getitem__)
            measure = Measure(ACCURACY, dict(zip(images.ids, right.double().tolist(), strict=True)), counts=True)
            measure = Rows((), *images.groups(torch.arange(len(images)))).grouped(measure)
            for choice in dict.fromkeys(self.choice(config) for config in self.study.arms.values()):
                protocol = f"{split} images, {choice}"
                scores.append(Score(_TASK, task, protocol, measure, CLEAN, examples=images.content))
        return scores

    def view(
        self, net: PixelNet, training: Training, split: str, number: int, records: Path, images: Gathered | None = None
    ) -> TaskView:
        """Return one task of a net. images: Images of the task, in a store of features."""
        union = self.data.union
        task = union.tasks[number]
        images = self.data.part(number, split) if images is None else images
        return TaskView(
            net=self.classifier(net, training, number),
            batches=InOrder(images, self.config.evaluate.batch),
            num_classes=union.num_classes,
            task=_TASK,
            data=task,
            part=f"{split} images",
            choice=self.choice(self.study.config_of(training)),
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

    # ---- what is fitted on validation images --------------------------------------------------------------------------

    @property
    def validated(self) -> bool:
        """Whether every task has validation images."""
        return all(self.data.has_part(task, "validation") for task in range(len(self.data.union.tasks)))

    def fitted_once(
        self, path: Path, kind: type[Fitted], net: PixelNet, fit: Callable[[], Fitted], ending: str = ""
    ) -> Fitted:
        """Return the values that are fitted once for the weights of a net and the validation images of all tasks."""
        parts = [self.data.part(task, "validation") for task in range(len(self.data.union.tasks))]
        fingerprint = " ".join((net.fingerprint(), *map(names_digest, parts))) + ending
        return fitted_once(path, kind, fingerprint, fit, examples=joint_content(parts))

    def parts(self, number: int) -> tuple[Tensor, Tensor]:
        """Return masks of a task's validation images that choose rates, and of the images on which features are fitted."""
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

    def softmaxes(self, training: Training, quantiles: Mapping[str, float]) -> list[Softmax]:
        """Return the softmaxes of a net for images of the user: one over all classes, or one for each task.

        A softmax over all classes takes the largest threshold of a task for its conformal sets, which covers every task's images.

        quantiles: Largest -log p of a class in a conformal set, by task.
        """
        union, names, separate = self.data.union, self.data.label_names, self.separate(training)
        tasks = [union.tasks[task] for task in union.task_of_class().tolist()]
        if not separate:
            return [Softmax(slice(0, union.num_classes), names, tasks, max(quantiles.values(), default=None))]
        spans = {task: union.span(number) for number, task in enumerate(union.tasks)}
        return [Softmax(span, names[span], tasks[span], quantiles.get(task)) for task, span in spans.items()]

    def with_head(self, net: PixelNet, training: Training, make: MakeHead) -> PixelNet:
        """Return a copy of a net with another head, made from the images of the arm's tasks. The latest copy is kept."""
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


@dataclass(frozen=True, kw_only=True)
class TaskView(ImageView):
    """The images of one task of a run. pixels: Net over all tasks. number: Number of the task."""

    evaluation: Evaluation
    pixels: PixelNet
    training: Training
    number: int

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        stem, config = name if of_net else f"{name}-{self.data}", self.evaluation.config
        path = self.records.with_name(f"{stem}.json")
        ending = " half" if divides(config.evaluate, config.tune) else ""
        return self.evaluation.fitted_once(path, kind, self.pixels, fit, ending)

    def validation(self) -> list[Validation]:
        outputs = self.evaluation.validation(self.pixels, self.training)
        return [Validation(*pair, self.evaluation.parts(number)[1]) for number, pair in enumerate(outputs)]

    @property
    def task_of_class(self) -> Tensor:
        return self.evaluation.data.union.task_of_class()

    @property
    def class_counts(self) -> list[int]:
        return self.evaluation.data.class_counts()

    @property
    def head_shape(self) -> tuple[str, int, int]:
        evaluation = self.evaluation
        name = evaluation.study.config_of(self.training).head_name
        return name, self.num_classes, cast(int, self.pixels.backbone.width)

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
        return other.scores(features=[Quality(None)])
