"""Evaluation of a dense run: every task of every training on the images in their fixed size, clean, attacked and corrupted.

The score of a task is pooled over the n images that have a value of the task. Its values by example are the jackknife's
pseudo-values (pooled_score.py), which for accuracy are 1 and 0. The interval of delta_m comes from the same values (delta.py).
Under an attack, the arms and their baselines are each attacked on their own losses.

An image without a valid pixel of a task is left out of the task's score, n, records and interval, and has no effect on delta_m
through that task. The n of delta_m counts the images with a value of any task. A score that is undefined (`absent: nan`) has no
number, and the report says why.

One record has every image of a part with the states of all tasks under all conditions, and for tasks of whole images the
columns of features. The logits of a task with classes may have further forms (`adjust_logits`), chosen by the score of the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
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
from vismt.engine import runtime
from vismt.engine.study import Study, Training
from vismt.evaluation.sections import asked_scores, divides, perturbations
from vismt.jobs.image_scores import ImageView
from vismt.jobs.multitask.config import MultitaskConfig, image_tasks, trained_tasks, window_of
from vismt.jobs.multitask.maps_data import DenseData, FittedImages
from vismt.jobs.multitask.models import fingerprint
from vismt.jobs.multitask.pooled_score import PooledScore, Undefined
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.inference import predict
from vismt.multitask.nets import DenseNet
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import Classification, Segmentation, unite
from vismt.report.comparison import CONSTANT
from vismt.report.results import RECORDS
from vismt.robustness.attacks.dense_attack import DenseAttack
from vismt.robustness.conditions import DensePerturbation, condition_of
from vismt.robustness.corruptions import CorruptionSpec, corrupt
from vismt.storage.files import atomic_write, sealed
from vismt.storage.fitted import fitted_once
from vismt.storage.paths import file_name
from vismt.storage.records import Field, Header, Records, Row
from vismt.uncertainty.features import (
    COUNTS,
    PROBABILITIES,
    Feature,
    Fitted,
    Form,
    Inputs,
    Rows,
    Validation,
    feature_settings,
)
from vismt.uncertainty.intervals import CLEAN, HIGHER, LOWER, NUMBER, SHARE, Condition, Measure, Score

NUMBERS = ".numbers.json"  # ending of the file beside a record with the numbers of the metrics
UNDEFINED, CLASS_NAMES = "undefined", "class_names"  # of this file, by task
CONTENT = "content"  # of a row, what tells its sample from others of its name
_LEAST = 1e-6  # lower bound of a score before its logarithm


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
        path = next(iter(pools.values())).path
        stem = path.stem if condition == CLEAN else f"{path.stem}-{file_name(condition.label)}"
        names = {name: task.shown_names for name, task in self.tasks.items() if isinstance(task, Segmentation)}
        content = {"numbers": numbers, UNDEFINED: undefined, CLASS_NAMES: names}
        ranks.on_first(lambda: atomic_write(path.with_name(f"{stem}{NUMBERS}"), sealed(content)))
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
        records: Path,
        inputs: Inputs,
        features: Sequence[Feature] = (),
    ) -> list[Score]:
        """Return the scores of one training, clean and under each condition that touches one of its tasks.

        net: Function that returns the evaluated net, called if a condition is not on record. records: Folder of records.
        inputs: What attacks and corruptions meet. features: Features for tasks of whole images.
        """
        pools = self.pooled(net, training, split, records, inputs, features)
        forms = {at: of for at, of in pools.items() if any(pool.form is not None for pool in of.values())}
        scores = [
            score for at, of in pools.items() if at not in forms for score in self.as_scores(of, training, split, at)
        ]
        for task, view in self.views(net, training, split, records).items():
            clean, of_task = pools[CLEAN][task], [of[task] for at, of in pools.items() if at not in forms]
            if all(of.of_inputs or of is clean.features[0] for of in clean.features):
                continue  # nothing is asked of answers
            rows = [
                {"id": image, **dict(chain(*(of.answers[image].items() for of in of_task)))} for image in clean.answers
            ]
            conditions = [(condition_of(of.spec), of.spec.worst_case) for of in of_task if of.spec is not None]
            found = Rows(rows, *self.data.part(split).groups(), clean.examples, [(CLEAN, False), *conditions])
            scores += asked_scores(clean.features, view, found, partial(view.outside, clean.features))
        return scores + [score for at, of in forms.items() for score in self.as_scores(of, training, split, at)]

    def pooled(
        self,
        net: Callable[[], DenseNet],
        training: Training,
        split: str,
        records: Path,
        inputs: Inputs,
        features: Sequence[Feature] = (),
    ) -> dict[Condition, dict[str, PooledScore]]:
        """Return the images of every task of one training under every condition, from their record if there is one.

        Arguments are as for `scores`.
        """
        tasks = self._trained(training)
        asked = {task.name: self.view(net, training, split, records, task).asked(features) for task in tasks}
        specs = [of for of in perturbations(features, inputs) if not isinstance(of, DenseAttack) or of.attacked(tasks)]
        pools: dict[Condition, dict[str, PooledScore]] = {}
        for at, spec in ((CLEAN, None), *((condition_of(spec), spec) for spec in specs)):
            pools[at] = {
                task.name: PooledScore(task, at.label, [of for of in asked[task.name] if not of.decides], spec)
                for task in tasks
            }
        for task in tasks:
            for at, form in ((at, form) for of in asked[task.name] if of.decides for at, form in of.forms.items()):
                pools.setdefault(at, {})[task.name] = PooledScore(task, at.label, form=form)
        path = records / f"{split}.jsonl"
        self.fill([pool for of in pools.values() for pool in of.values()], net, training, split, path)
        return pools

    def view(self, net: Callable[[], DenseNet], training: Training, split: str, records: Path, task: Task) -> TaskView:
        """Return one task of a net. Arguments are as for `scores`."""
        images = FittedImages(self.data.part(split), self.data.size)
        return TaskView(
            net=_OfTask(self, net, task.name),
            batches=InOrder(images, self.config.evaluate.batch),
            num_classes=task.outputs if isinstance(task, Classification) else task.channels,
            task=task.name,
            data=self.data.part(split).name,
            part=self.protocol(split),
            choice="",
            records=records / f"{task.name}.jsonl",
            source="",
            fingerprint=self._weights(training),
            label=f"{task.name}, {training}",
            opened=lambda entry: nullcontext(self.data.outside(entry)),
            evaluation=self,
            made=net,
            training=training,
            of=task,
        )

    def views(self, net: Callable[[], DenseNet], training: Training, split: str, records: Path) -> dict[str, TaskView]:
        """Return the tasks of whole images of a training. Arguments are as for `scores`."""
        tasks = image_tasks(self._trained(training))
        return {task.name: self.view(net, training, split, records, task) for task in tasks}

    def constant_scores(self, training: Training, split: str) -> list[Score]:
        """Return the scores of the best constant predictions of the training part. training: Placeholder of this model."""
        trained = {task.name for arm in self.study.arms.values() for task in trained_tasks(arm)}
        tasks = [task for name, task in self.tasks.items() if name in trained]
        if self.config.head_section.labels == "union":
            tasks = unite(tasks)
        pools = {task.name: PooledScore(task) for task in tasks}
        path = training.folder / RECORDS / f"{split}.jsonl"
        self.fill([*pools.values()], lambda: self.data.constants(tasks), training, split, path)
        return self.as_scores({name: pool for name, pool in pools.items() if pool.filled}, training, split)

    def fill(
        self,
        pools: Sequence[PooledScore],
        net: Callable[[], DenseNet | dict[str, Tensor]],
        training: Training,
        split: str,
        path: Path,
    ) -> None:
        """Add the images of a part to pools, from the record in `path` if it has them.

        net: Function that returns the evaluated net, or constant predictions (channels,) by task.
        """
        part = self.data.part(split)
        specs = [*dict.fromkeys(pool.spec for pool in pools)]
        settings = {
            "conditions": [spec.settings() for spec in specs if spec is not None],
            "forms": [f"{pool.task.name} {pool.condition}" for pool in pools if pool.form is not None],
            "features": {pool.task.name: feature_settings(pool.features) for pool in pools if pool.form is None},
        }
        header = Header(self._weights(training), self.files(split), {"images": self.protocol(split)}, settings)
        fields = {key: values for pool in pools for key, values in pool.fields().items()}
        log = Records(path, header, {CONTENT: Field(text=True), **fields})
        starts, ids = self._starts(split), part.ids
        batches = [ids[start : start + starts.step] for start in starts]
        # Here, because all processes make it together.
        evaluated = net() if any(name not in log for name in ids) else {}

        def rows_of(number: int) -> list[Row]:
            names, samples, batch = self._batch(split, starts[number])
            rows: list[Row] = [
                {"id": name, CONTENT: part.content(starts[number] + place)} for place, name in enumerate(names)
            ]
            for spec in specs:
                asked = [pool for pool in pools if pool.spec == spec]
                images = self._changed(evaluated, asked, names, samples, batch, spec)
                logits = self.logits(evaluated, {**batch, "image": images})
                for pool in (pool for pool in asked if pool.task.name in logits):  # else no constant prediction
                    task = self.tasks[pool.task.name]
                    answer = partial(self.answers, lambda: cast("DenseNet", evaluated), task.name)
                    for place, sample in enumerate(samples):
                        if task.key in sample:
                            # Without the padding, from which odsF would compute too large an image diagonal.
                            prediction = _inside(task, logits[task.name][place : place + 1], size_of(sample))
                            image = images[place : place + 1].to(runtime.processes().device)
                            rows[place] |= pool.columns(prediction, sample[task.key][None], answer, image, names[place])
            return rows

        rows = log.complete(batches, rows_of, f"{split} {training}")
        for pool in pools:
            pool.path = path
            pool.examples = digest(" ".join(row[CONTENT] for row in rows).encode())
            for row in rows:
                pool.add(row)

    def _weights(self, training: Training) -> str:
        if training.arm == CONSTANT and training.arm not in self.study.arms:
            return f"{Identity(self.data.parts['train'].ids)} {self.files('train')}"
        return fingerprint(training)

    def files(self, part: str) -> str:
        return ranks.on_first(lambda: self.data.part(part).files)

    def _changed(
        self,
        net: DenseNet | dict[str, Tensor],
        pools: Sequence[PooledScore],
        names: Sequence[str],
        samples: Sequence[Sample],
        batch: Sample,
        spec: DensePerturbation | None,
    ) -> Tensor:
        """Return the images (b, 3, h, w) of a batch under a condition.

        They are corrupted before the padding, or attacked through the whole inference, windows and mirrored image included.
        """
        if spec is None or isinstance(net, dict):
            return batch["image"]
        if isinstance(spec, CorruptionSpec):
            changed = [
                corrupt(sample["image"][None], spec.name, spec.severity, seed=mix_seed(spec.seed, name))[0]
                for name, sample in zip(names, samples)
            ]
            return torch.stack([pad({"image": image}, self.data.size)["image"] for image in changed])
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
            self.data.counted([pool.task for pool in pools]),
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
        return (
            rows.ids[numbers.start : numbers.stop],
            samples,
            collate([pad(sample, self.data.size) for sample in samples]),
        )

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


def _inside(task: Task, prediction: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the part of a map that belongs to the image and not to its padding. A whole image's output is unchanged."""
    return prediction[..., : size[0], : size[1]] if isinstance(task, MapTask) else prediction


@dataclass(frozen=True, kw_only=True)
class TaskView(ImageView):
    """The images of one task of a run. made: Function that returns the net over all tasks. of: Task."""

    evaluation: Evaluation
    made: Callable[[], DenseNet]
    training: Training
    of: Task

    def asked(self, features: Sequence[Feature]) -> list[Feature]:
        """Return the features that the task has, fitted: on choices among classes of whole images, and on counted classes."""
        kinds = {PROBABILITIES: Classification, COUNTS: ClassLoss}
        fit = [of for of in features if all(isinstance(self.of, kinds.get(need, object)) for need in of.needs)]
        return [feature.fitted(self) for feature in fit]

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        """Fit beside the records, because the evaluated net may be another version of the trained net."""
        of, config = self.evaluation, self.evaluation.config
        fitted_on = f"{self.fingerprint} {Identity(of.data.part('validation').ids)}"
        fitted_on += " half" if divides(config.evaluate, config.tune) else ""
        path = self.records.with_name(f"{name}-{self.task}.json")
        return fitted_once(path, kind, fitted_on, fit, examples=of.files("validation"), shared=True)

    @torch.no_grad()
    def validation(self) -> list[Validation]:
        task, of = self.of, self.evaluation
        assert isinstance(task, Classification)
        labels, groups = of.data.classes("validation", task), of.data.class_groups("validation", task)
        batches = InOrder(of.data.whole_images("validation", task), of.config.evaluate.batch)
        logits = torch.cat([self.net(images).float().cpu() for images, _, _ in batches])
        fits = validation_parts(labels, divides(of.config.evaluate, of.config.tune), groups)[1]
        return [Validation(logits, task.placed(labels), fits)]

    def judged(self, forms: Mapping[float, Form]) -> dict[float, float]:
        """Return the score of the task on the validation images with each form of the logits."""
        pools = {value: PooledScore(self.of, f"{value:g}", form=form) for value, form in forms.items()}
        path = self.records.with_name(f"validation-{self.task}-forms.jsonl")
        self.evaluation.fill([*pools.values()], self.made, self.training, "validation", path)
        return {value: pool.value() for value, pool in pools.items()}

    @property
    def class_counts(self) -> list[int]:
        return self.evaluation.data.class_counts(self.of)


class _OfTask(nn.Module):
    """The answers (b, channels) of one task of whole images, as the evaluation computes them."""

    def __init__(self, evaluation: Evaluation, net: Callable[[], DenseNet], task: str) -> None:
        super().__init__()
        self.evaluation, self.made, self.task = evaluation, net, task

    def forward(self, images: Tensor) -> Tensor:
        return self.evaluation.answers(self.made, self.task, images.to(runtime.processes().device))
