"""Evaluation of a dense run: every task of every training on the images in their fixed size, clean, attacked and corrupted.

The score of a task is pooled over the n images that have a value of the task. Its values by example are the jackknife's
pseudo-values (pooled_score.py), which for accuracy are 1 and 0. The interval of delta_m comes from the same values (delta.py).
Under an attack, the arms and their baselines are each attacked on their own losses.

An image without a valid pixel of a task is left out of the task's score, n, records and interval, and has no effect on delta_m
through that task. The n of delta_m counts the images with a value of any task. A score that is undefined (`absent: nan`) has no
number, and the report says why.

Tasks of whole images have a record of the probabilities of every image, and of the columns of features. With
evaluate.adjust_logits the tasks with classes are also scored with z - tau log pi (class_loss.py), by the tau with the best
score on the validation images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.base.identity import Identity
from vismt.base.seeds import digest, mix_seed
from vismt.data.batching import InOrder
from vismt.data.division import validation_parts
from vismt.data.maps.dense_sample import Sample, collate, size_of
from vismt.data.maps.dense_transforms import pad
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Study, Training
from vismt.evaluation.adjust_logits import ADJUSTED, TAUS
from vismt.evaluation.quality import Quality
from vismt.evaluation.sections import asked_scores, divides
from vismt.jobs.multitask.config import MultitaskConfig, image_tasks, trained_tasks, window_of
from vismt.jobs.multitask.maps_data import DenseData
from vismt.jobs.multitask.models import fingerprint
from vismt.jobs.multitask.pooled_score import PooledScore, Undefined
from vismt.multitask.class_loss import ClassLoss, adjusted
from vismt.multitask.inference import predict
from vismt.multitask.nets import DenseNet
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import Classification, Segmentation, unite
from vismt.report.comparison import CONSTANT
from vismt.report.results import RECORDS
from vismt.robustness.attacks.dense_attack import DenseAttack
from vismt.robustness.conditions import DensePerturbation, condition_of
from vismt.robustness.corruptions import CorruptionSpec, corrupt
from vismt.robustness.evaluate import ImageQuestions
from vismt.storage.files import atomic_write, sealed
from vismt.storage.fitted import fitted_once
from vismt.storage.records import Field, Header, Records, Row
from vismt.uncertainty.features import Feature, Fitted, Rows, Validation, View
from vismt.uncertainty.intervals import CLEAN, HIGHER, LOWER, NUMBER, SHARE, Condition, Measure, Score

NUMBERS = ".numbers.json"  # ending of the file beside a record with the numbers of the metrics
UNDEFINED, CLASS_NAMES = "undefined", "class_names"  # of this file, by task
CONTENT = "content"  # of a row, what tells its sample from others of its name
ADJUSTMENT = "adjustment.json"
_LEAST = 1e-6  # lower bound of a score before its logarithm


@dataclass(frozen=True)
class Adjustment:
    """The tau of each task, and the validation score of each task and tau that was tried."""

    taus: dict[str, float]
    validation: dict[str, float]


class Evaluation:
    """Scores of nets on the samples in `data`."""

    def __init__(self, study: Study[MultitaskConfig], data: DenseData) -> None:
        self.study = study
        self.config = study.config
        self.data = data
        self.tasks = data.tasks

    def _trained(self, training: Training) -> list[Task]:
        return trained_tasks(self.study.config_of(training))

    def as_scores(
        self, pools: Mapping[str, PooledScore], training: Training, split: str, condition: Condition = CLEAN
    ) -> list[Score]:
        """Return the scores of the tasks of a training under a condition, each followed by the further numbers of the task.

        A file beside the record of the pools has everything that the metrics compute.
        """
        scores, numbers, undefined = [], {}, {}
        for name, pool in pools.items():
            task = self.tasks[name]
            try:
                scored = pool.result()
            except Undefined as error:
                console.stage("eval", f"{training}   {error}")
                undefined[name] = str(error)
                continue
            numbers[name] = scored.numbers
            for key, values in {task.measure: scored.images, **scored.further}.items():
                if split == "validation" and pool.answers:
                    chooses, _ = self.halves(pool.answers)
                    values = dict(compress(values.items(), chooses.tolist()))
                number = task.numbers[key]
                scale, better = SHARE if number.share else NUMBER, LOWER if number.lower_is_better else HIGHER
                measure = Measure(number.name, values, scale, better, further=key != task.measure)
                scores.append(self._score(name, split, measure, condition, scored.examples))
        path = next(iter(pools.values())).path.with_suffix(NUMBERS)
        names = {name: task.shown_names for name, task in self.tasks.items() if isinstance(task, Segmentation)}
        content = {"numbers": numbers, UNDEFINED: undefined, CLASS_NAMES: names}
        ranks.on_first(lambda: atomic_write(path, sealed(content)))
        return scores

    def _score(self, task: str, split: str, measure: Measure, condition: Condition, examples: str) -> Score:
        part = self.data.part(split)
        grouped = Rows([], *part.groups()).grouped(measure)
        return Score(task, part.name, self.protocol(split), grouped, condition, examples=examples)

    def halves(self, answers: Mapping[str, Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Return masks of the labelled validation images that choose rates, and of the images on which features are fitted."""
        labels = torch.tensor([int(row["label"]) for row in answers.values()])
        of_image, _ = self.data.part("validation").groups()
        groups = [of_image[image] for image in answers] if of_image else []
        return validation_parts(labels, divides(self.config.evaluate, self.config.tune), groups)

    def protocol(self, split: str) -> str:
        settings = self.config.evaluate
        height, width = window_of(self.config)
        text = f"{split} images at {self.data.size[0]} x {self.data.size[1]}"
        if (height, width) != self.data.size:
            text += f", windows of {height} x {width} that share {settings.overlap:g}"
        if settings.scales != [1.0]:
            text += f", mean over scales {', '.join(f'{scale:g}' for scale in settings.scales)}"
        return text + ", mean with the mirrored image" if settings.flip else text

    def quality(self, scores: Sequence[Score], undefined: int = 0) -> float:
        """Return the geometric mean over the tasks of the score, or of 1 / score if lower is better.

        It ranks trainings independently of the units of the scores, and to first order as delta_m over any baseline does, so
        that no baseline has to be trained first. undefined: Number of scores without a number, which count as _LEAST.
        """
        measures = [score.measure for score in scores if not score.measure.further]
        logs = [math.log(max(measure.score, _LEAST)) for measure in measures]
        signs = [-1 if measure.better == LOWER else 1 for measure in measures]
        total = math.fsum(sign * log for sign, log in zip(signs, logs)) + undefined * math.log(_LEAST)
        return math.exp(total / (len(logs) + undefined))

    def scores(
        self,
        net: Callable[[], DenseNet],
        training: Training,
        split: str,
        specs: Sequence[DensePerturbation],
        records: Path,
        features: Sequence[Feature] = (),
    ) -> list[Score]:
        """Return the scores of one training, clean and under each condition that touches one of its tasks.

        net: Function that returns the evaluated net, called if a condition is not on record. records: Folder of records.
        features: Features for tasks of whole images.
        """
        views = self.views(net, training, split, records)
        asked = {task: [feature.fitted(view) for feature in features] for task, view in views.items()}
        touching = [s for s in specs if not isinstance(s, DenseAttack) or s.attacked(self._trained(training))]
        scores, found = [], []
        for spec in (None, *touching):
            found.append(self.pooled(net, training, split, records, spec, asked))
            scores += self.as_scores(found[-1], training, split, CLEAN if spec is None else condition_of(spec))
        conditions = [(CLEAN, False), *((condition_of(spec), spec.worst_case) for spec in touching)]
        for task, view in views.items() if features else ():
            rows = [
                {"id": image, **{name: value for pools in found for name, value in pools[task].answers[image].items()}}
                for image in found[0][task].answers
            ]
            groups, examples = self.data.part(split).groups(), found[0][task].examples
            of_task = Rows(rows, *groups, examples, conditions)
            scores += asked_scores([Quality(None), *asked[task]], view, of_task, partial(view.outside, asked[task]))
        return scores

    def views(self, net: Callable[[], DenseNet], training: Training, split: str, records: Path) -> dict[str, TaskView]:
        """Return the tasks of whole images of a training. Arguments are as for `scores`."""
        return {
            task.name: TaskView(self, net, training, split, records, task)
            for task in image_tasks(self._trained(training))
        }

    def constant_scores(self, training: Training, split: str) -> list[Score]:
        """Return the scores of the best constant predictions of the training part. training: Placeholder of this model."""
        trained = {task.name for arm in self.study.arms.values() for task in trained_tasks(arm)}
        tasks = [task for name, task in self.tasks.items() if name in trained]
        if self.config.head_section.labels == "union":
            tasks = unite(tasks)
        pools = {task.name: PooledScore(task) for task in tasks}
        path = training.folder / RECORDS / f"{split}.jsonl"
        self._fill(pools, lambda: self.data.constants(tasks), training, split, path)
        return self.as_scores({name: pool for name, pool in pools.items() if pool.filled}, training, split)

    def pooled(
        self,
        net: Callable[[], DenseNet],
        training: Training,
        split: str,
        records: Path,
        spec: DensePerturbation | None = None,
        features: Mapping[str, Sequence[Feature]] | None = None,
    ) -> dict[str, PooledScore]:
        """Return the images of every task of one training, clean or under a condition, from their record if there is one.

        features: Fitted features, by task. Other arguments are as for `scores`.
        """
        condition, asked = CLEAN.label if spec is None else spec.label, features or {}
        pools = {
            task.name: PooledScore(task, condition=condition, features=asked.get(task.name, ()))
            for task in self._trained(training)
        }
        key = "" if spec is None else f"-{digest(json.dumps(spec.settings(), sort_keys=True).encode())[:8]}"
        self._fill(pools, net, training, split, records / f"{split}{key}.jsonl", spec)
        return pools

    def adjusted_scores(
        self, net: Callable[[], DenseNet], training: Training, split: str, records: Path
    ) -> list[Score]:
        """Return the scores of the tasks with classes, their logits adjusted by the tau of validation.

        Arguments are as for `scores`.
        """
        tasks = [task for task in self._trained(training) if isinstance(task, ClassLoss)]
        if not tasks:
            return []
        pools = {task.name: PooledScore(task) for task in tasks}
        taus = self._taus(net, training, tasks, records)
        self._fill(pools, net, training, split, records / f"{split}-adjusted.jsonl", taus=taus)
        return self.as_scores(pools, training, split, ADJUSTED)

    def _taus(
        self, net: Callable[[], DenseNet], training: Training, tasks: Sequence[Task], records: Path
    ) -> dict[str, float]:
        """Return each task's best tau on the validation images (ties: the smallest)."""

        def fit() -> Adjustment:
            tried = {f"{task.name} {tau:g}": (task, tau) for task in tasks for tau in TAUS}
            pools = {name: PooledScore(task, name) for name, (task, _) in tried.items()}
            taus = {name: tau for name, (_, tau) in tried.items()}
            self._fill(pools, net, training, "validation", records / "validation-taus.jsonl", taus=taus)
            values = {name: pool.value() for name, pool in pools.items()}
            best = {task.name: max(TAUS, key=lambda tau: values[f"{task.name} {tau:g}"]) for task in tasks}
            return Adjustment(best, values)

        path, examples = training.folder / ADJUSTMENT, self.files("validation")
        return fitted_once(path, Adjustment, self.fitted_on(training), fit, examples=examples, shared=True).taus

    def _fill(
        self,
        pools: Mapping[str, PooledScore],
        net: Callable[[], DenseNet | dict[str, Tensor]],
        training: Training,
        split: str,
        path: Path,
        spec: DensePerturbation | None = None,
        taus: Mapping[str, float] | None = None,
    ) -> None:
        """Add the images of a part to pools, from the record in `path` if it has them.

        net: Function that returns the evaluated net, or constant predictions (channels,) by task. taus: tau of the logits by
        pool, 0 for no change.
        """
        part = self.data.part(split)
        log = Records(path, self._header(pools, training, split, spec, taus or {}), _fields(pools))
        starts, ids = self._starts(split), part.ids
        batches = [ids[start : start + starts.step] for start in starts]
        evaluated = (
            net() if any(name not in log for name in ids) else {}
        )  # here, because all processes make it together
        device = runtime.processes().device

        def rows_of(number: int) -> list[Row]:
            names, samples, batch = self._batch(split, starts[number])
            if isinstance(spec, CorruptionSpec):
                changed = [  # corrupted before the padding
                    corrupt(sample["image"][None], spec.name, spec.severity, seed=mix_seed(spec.seed, name))[0]
                    for name, sample in zip(names, samples)
                ]
                batch["image"] = torch.stack([pad({"image": image}, self.data.size)["image"] for image in changed])
            elif spec is not None and not isinstance(evaluated, dict):
                tasks = [pool.task for pool in pools.values()]
                batch["image"] = self._attacked(evaluated, tasks, names, samples, batch, spec)
            logits = self.logits(evaluated, batch)
            rows: list[Row] = [
                {"id": name, CONTENT: part.content(starts[number] + place)} for place, name in enumerate(names)
            ]
            for name, pool in pools.items():
                task, tau = self.tasks[pool.task.name], (taus or {}).get(name, 0.0)
                if task.name not in logits:  # no constant prediction
                    continue
                outputs = logits[task.name]
                outputs = adjusted(outputs, self.data.class_counts(task), tau) if tau else outputs
                answer = partial(self.answers, lambda: cast("DenseNet", evaluated), task.name)  # of pools with features
                for place, sample in enumerate(samples):
                    if task.key in sample:
                        # Without the padding, from which odsF would compute too large an image diagonal.
                        prediction = _inside(task, outputs[place : place + 1], size_of(sample))
                        image = batch["image"][place : place + 1].to(device)
                        rows[place] |= pool.columns(prediction, sample[task.key][None], answer, image, names[place])
            return rows

        what = "" if spec is None else f"   {spec.label}"
        rows = log.complete(batches, rows_of, f"{split} {training}{what}")
        for pool in pools.values():
            pool.path = path
            pool.examples = digest(" ".join(row[CONTENT] for row in rows).encode())
            for row in rows:
                pool.add(row)

    def _header(
        self,
        pools: Mapping[str, PooledScore],
        training: Training,
        split: str,
        spec: DensePerturbation | None,
        taus: Mapping[str, float],
    ) -> Header:
        settings = {
            "condition": None if spec is None else spec.settings(),
            "taus": taus,
            "features": {name: {of.key: of.settings() for of in pool.features} for name, pool in pools.items()},
        }
        return Header(self._weights(training), self.files(split), {"images": self.protocol(split)}, settings)

    def _weights(self, training: Training) -> str:
        if training.arm == CONSTANT and training.arm not in self.study.arms:
            return f"{Identity(self.data.parts['train'].ids)} {self.files('train')}"
        return fingerprint(training)

    def files(self, part: str) -> str:
        return ranks.on_first(lambda: self.data.part(part).files)

    def fitted_on(self, training: Training) -> str:
        return f"{self._weights(training)} {Identity(self.data.part('validation').ids)}"

    def _attacked(
        self,
        net: DenseNet,
        tasks: Sequence[Task],
        names: Sequence[str],
        samples: Sequence[Sample],
        batch: Sample,
        spec: DenseAttack,
    ) -> Tensor:
        """Return the images (b, 3, h, w) attacked through the whole inference, windows and mirrored image included."""
        device = runtime.processes().device
        inside = torch.zeros(len(samples), 1, *self.data.size, dtype=torch.bool)
        for row, sample in enumerate(samples):
            height, width = size_of(sample)
            inside[row, :, :height, :width] = True
        placed = {name: values.to(device) for name, values in batch.items()}
        return spec.perturb(
            net,
            lambda images: self._predicted(net, images),
            placed["image"],
            placed,
            self.data.counted(tasks),
            ids=names,
            inside=inside.to(device),
        ).cpu()

    def _starts(self, split: str) -> range:
        return range(0, len(self.data.part(split)), self.config.evaluate.batch)

    def _batch(self, split: str, start: int) -> tuple[list[str], list[Sample], Sample]:
        """Return (ids, fitted samples, the same samples padded and collated) of the batch from image `start` on."""
        rows = self.data.part(split)
        numbers = range(start, min(len(rows), start + self.config.evaluate.batch))
        samples = [rows.unpadded(i, self.data.size) for i in numbers]
        return [rows.ids[i] for i in numbers], samples, collate([pad(sample, self.data.size) for sample in samples])

    def logits(self, net: DenseNet | dict[str, Tensor], batch: Sample) -> dict[str, Tensor]:
        """Return the outputs of a net, or of constant predictions, by task, on the CPU."""
        if isinstance(net, dict):
            count, _, height, width = batch["image"].shape
            sizes = {name: (height, width) if isinstance(self.tasks[name], MapTask) else () for name in net}
            return {
                name: value.reshape(1, -1, *(1 for _ in sizes[name])).expand(count, -1, *sizes[name])
                for name, value in net.items()
            }
        with torch.no_grad():
            outputs = self._predicted(net, batch["image"].to(runtime.processes().device))
        return {task: value.cpu() for task, value in outputs.items()}

    def answers(self, net: Callable[[], DenseNet], task: str, images: Tensor) -> Tensor:
        return self._predicted(net(), images)[task]

    def _predicted(self, net: DenseNet, images: Tensor) -> dict[str, Tensor]:
        settings = self.config.evaluate
        return predict(net, self.tasks, images, overlap=settings.overlap, flip=settings.flip, scales=settings.scales)

    def outputs(self, merged: DenseNet, plain: DenseNet) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield the outputs of both nets on the first batch of evaluated images; classes of pixels or images count as answers."""
        split = self.config.evaluate.split
        for start in ranks.my_share(self._starts(split)[:1]):
            batch = self._batch(split, start)[2]
            merged_logits = self.logits(merged, batch)
            plain_logits = self.logits(plain, batch)
            for task, value in merged_logits.items():
                yield task, value, plain_logits[task], self.tasks[task].predicts_classes


def _fields(pools: Mapping[str, PooledScore]) -> dict[str, Field]:
    """Return the fields of the row of an image."""
    return {
        CONTENT: Field(text=True),
        **{key: values for pool in pools.values() for key, values in pool.fields().items()},
    }


def _inside(task: Task, prediction: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the part of a map that belongs to the image and not to its padding. A whole image's output is unchanged."""
    return prediction[..., : size[0], : size[1]] if isinstance(task, MapTask) else prediction


@dataclass(frozen=True)
class TaskView(View):
    """The images of a task of whole images. The other fields are arguments of `Evaluation.scores`."""

    evaluation: Evaluation
    net: Callable[[], DenseNet]
    training: Training
    split: str
    records: Path
    task: Task

    def score(self, measure: Measure, condition: Condition, examples: str, about: str = "", data: str = "") -> Score:
        name = data or self.evaluation.data.part(self.split).name
        protocol = ", ".join(filter(None, (self.evaluation.protocol(self.split), about)))
        return Score(self.task.name, name, protocol, measure, condition, examples=examples)

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        """Fit beside the records, because the evaluated net may be another version of the trained net."""
        of, config = self.evaluation, self.evaluation.config
        fitted_on = of.fitted_on(self.training) + (" half" if divides(config.evaluate, config.tune) else "")
        path = self.records / f"{name}-{self.task.name}.json"
        return fitted_once(path, kind, fitted_on, fit, examples=of.files("validation"), shared=True)

    @torch.no_grad()
    def validation(self) -> list[Validation]:
        task, of = self.task, self.evaluation
        assert isinstance(task, Classification)
        labels, groups = of.data.classes("validation", task), of.data.class_groups("validation", task)
        batches = InOrder(of.data.whole_images("validation", task), of.config.evaluate.batch)
        logits = torch.cat([_OfTask(self)(images).float().cpu() for images, _, _ in batches])
        fits = validation_parts(labels, divides(of.config.evaluate, of.config.tune), groups)[1]
        return [Validation(logits, task.placed(labels), fits)]

    def outside(self, features: Sequence[Feature], entry: str) -> Rows:
        """Return the columns of features of the images of a set of other classes."""
        evaluation, name = self.evaluation, row_name(entry)
        images, task = evaluation.data.outside(entry), self.task
        assert isinstance(task, Classification)
        columns = [of for of in features if any(one.outside == entry for one in of.quantities())]
        questions = ImageQuestions(task.outputs, features=columns, data=name)
        path = self.records / f"{record_stem(self.task.name, name, 'outside')}.jsonl"
        log = questions.records(path, fingerprint(self.training), images.content)
        batches = InOrder(images, evaluation.config.evaluate.batch)
        label = f"{name} against {self.task.name}, {self.training}"
        return Rows(questions.answered(_OfTask(self), batches, log, label), *batches.groups, log.examples)


class _OfTask(nn.Module):
    """The answers (b, channels) of one task of whole images, as the evaluation computes them."""

    def __init__(self, view: TaskView) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        device = runtime.processes().device
        return self.view.evaluation.answers(self.view.net, self.view.task.name, images.to(device))
