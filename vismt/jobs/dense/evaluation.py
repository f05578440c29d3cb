"""Evaluation of a dense run: every task of every training on the images in their fixed size.

A task's score is pooled over the n images that have a value of the task; its values by example are the jackknife's
pseudo-values (pooled_score.py), which for accuracy are 1 and 0. delta_m (metrics/delta.py) over the configuration's
baseline has its interval from the same values: the first-order effect of every image on the scores and on the baseline's.
Only arms that train all tasks have a delta_m.

An image without a valid pixel of a task is left out of the task's score, n, records and interval, and has no effect on delta_m
through that task; the n of delta_m counts the images with a value of any task. Fewer than two images with a value are an error.
The option `absent` of a task sets the value of a class that no image has; with "nan" the score is undefined, also an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from vismt import console
from vismt.data.dense_sample import Sample, collate, size_of
from vismt.data.dense_transforms import pad
from vismt.engine import runtime
from vismt.engine.study import Training
from vismt.errors import UserError
from vismt.files import atomic_write, read_json
from vismt.jobs.dense.config import DELTA, DenseConfig, baseline_arms, trained_tasks, window_of
from vismt.jobs.dense.data import DenseData
from vismt.jobs.dense.models import fingerprint
from vismt.jobs.dense.pooled_score import PooledScore, Scored
from vismt.multitask.dense import DenseNet
from vismt.multitask.inference import predict
from vismt.multitask.metrics import delta_m
from vismt.multitask.tasks import DenseTask, MapTask
from vismt.report.results import Score
from vismt.stats import CLEAN, HIGHER, LOWER, NUMBER, SHARE, Measure

LEAST = 1e-6  # lower bound of a score before its logarithm


class Evaluation:
    """Scores of nets on the samples in `data`."""

    def __init__(self, config: DenseConfig, data: DenseData) -> None:
        self.config = config
        self.data = data
        self.tasks = data.tasks

    def scores(self, scored: Mapping[str, Scored], split: str) -> list[Score]:
        """Return one score for each task of a training."""
        return [self._score(self.tasks[name], task_score, split) for name, task_score in scored.items()]

    def _score(self, task: DenseTask, scored: Scored, split: str) -> Score:
        scale = SHARE if task.share else NUMBER
        better = LOWER if task.lower_is_better else HIGHER
        measure = Measure(metric_name(task), scored.images, scale, better)
        return Score(task.name, self.data.part(split).name, self._protocol(split), measure, CLEAN)

    def _protocol(self, split: str) -> str:
        """Return split, image size, windows and mirroring as text."""
        settings = self.config.evaluate
        height, width = window_of(self.config)
        text = f"{split} images at {self.data.size[0]} x {self.data.size[1]}"
        if (height, width) != self.data.size:
            text += f", windows of {height} x {width} that share {settings.overlap:g}"
        return text + ", mean with the mirrored image" if settings.flip else text

    def quality(self, scores: Sequence[Score]) -> float:
        """Return the geometric mean over the tasks of the score, 1 / score where lower is better.

        It ranks trainings independently of the units of the scores, and to first order as delta_m over any baseline does, so
        that no baseline has to be trained first.
        """
        logs = [math.log(max(score.measure.score, LEAST)) for score in scores]
        signs = [-1 if score.measure.better == LOWER else 1 for score in scores]
        return math.exp(math.fsum(sign * log for sign, log in zip(signs, logs)) / len(logs))

    def delta(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, list[Score]]:
        """Return delta_m of every arm that trains all tasks, by arm; none for the baseline itself."""
        baselines = baseline_arms(self.config)
        if not baselines:
            return {}
        by_arm = {arm: {score.task: score for score in arm_scores} for arm, arm_scores in scores.items()}
        base = {task: by_arm[arm][task] for task, arm in baselines.items() if task in by_arm.get(arm, {})}
        if len(base) < len(baselines):
            return {}
        deltas: dict[str, list[Score]] = {}
        for arm, by_task in by_arm.items():
            if set(baselines.values()) == {arm} or not set(baselines) <= set(by_task):
                continue
            try:
                deltas[arm] = [_delta({task: by_task[task] for task in baselines}, base, baselines.values())]
            except UserError as error:
                console.stage("eval", f"{arm}   no delta_m: {error}")
                return {}  # all arms or none: a table with a missing seed cannot be read
        return deltas

    def scored(self, net: DenseNet, training: Training, config: DenseConfig, split: str) -> dict[str, Scored]:
        """Score every task of one training and write the result to its folder.

        net: merged where that is exact. config: of the training.
        """
        path = training.folder / "records" / f"{split}.json"
        pools = {task.name: PooledScore(task) for task in trained_tasks(config)}
        for names, samples, batch in self._batches(split, str(training)):
            logits = self.logits(net, batch)
            for task, pool in pools.items():
                key = self.tasks[task].key
                for place, (name, sample) in enumerate(zip(names, samples)):
                    if key in sample:
                        # Without the padding, from which odsF would compute too large an image diagonal.
                        prediction = _inside(self.tasks[task], logits[task][place : place + 1], size_of(sample))
                        pool.add(name, prediction, sample[key][None])
        scored = {task: pool.result() for task, pool in pools.items()}
        tasks = {task: asdict(task_score) for task, task_score in scored.items()}
        atomic_write(path, json.dumps({"fingerprint": fingerprint(training), "tasks": tasks}))
        return scored

    def known(self, training: Training, split: str) -> dict[str, Scored] | None:
        """Return the scores that `scored` wrote for these weights, None where there are none."""
        path = training.folder / "records" / f"{split}.json"
        if not path.exists():
            return None
        content = read_json(path, f"run '{training.folder}': {path.name}")
        if not isinstance(content, dict) or content.get("fingerprint") != fingerprint(training):
            return None
        return {task: Scored(**values) for task, values in content["tasks"].items()}

    def _batches(self, split: str, label: str) -> Iterator[tuple[list[str], list[Sample], Sample]]:
        """Yield (ids, fitted samples, the same samples padded and collated) of a split in order."""
        rows = self.data.part(split)
        step = self.config.evaluate.batch
        for start in console.track(range(0, len(rows), step), "eval", f"{split} {label}"):
            numbers = range(start, min(len(rows), start + step))
            samples = [rows.unpadded(i, self.data.size) for i in numbers]
            yield [rows.ids[i] for i in numbers], samples, collate([pad(sample, self.data.size) for sample in samples])

    def logits(self, net: DenseNet, batch: Sample) -> dict[str, Tensor]:
        """Return the net's outputs by task, on the CPU."""
        settings = self.config.evaluate
        images = batch["image"].to(runtime.processes().device)
        with torch.no_grad():
            outputs = predict(net, self.tasks, images, overlap=settings.overlap, flip=settings.flip)
        return {task: value.cpu() for task, value in outputs.items()}

    def outputs(self, merged: DenseNet, plain: DenseNet, label: str) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield the outputs of both nets on the evaluated images; classes of pixels or images count as answers."""
        for _, _, batch in self._batches(self.config.evaluate.split, label):
            merged_logits = self.logits(merged, batch)
            plain_logits = self.logits(plain, batch)
            for task, value in merged_logits.items():
                yield task, value, plain_logits[task], self.tasks[task].predicts_classes


def metric_name(task: DenseTask) -> str:
    """Return the name of a task's score with its unit."""
    return f"{task.label} in {task.unit}" if task.unit else task.label


def _delta(scores: Mapping[str, Score], base: Mapping[str, Score], arms: Iterable[str]) -> Score:
    """Return delta_m of one arm over the baselines of its tasks, with the first-order effect of every image."""
    lower = {task: score.measure.better == LOWER for task, score in scores.items()}
    value = delta_m(
        {task: score.measure.score for task, score in scores.items()},
        {task: score.measure.score for task, score in base.items()},
        lower,
    )
    names = list(dict.fromkeys(name for score in scores.values() for name in score.measure.values))
    effect = dict.fromkeys(names, 0.0)
    for task, score in scores.items():
        measure = score.measure
        reference = base[task].measure
        sign = -1 if lower[task] else 1
        for name, psi in measure.values.items():  # images without a label of the task have no effect on it
            change = (psi - measure.score) / reference.score
            change -= measure.score * (reference.values[name] - reference.score) / reference.score**2
            effect[name] += sign * 100 / len(scores) * change * len(names) / len(measure.values)
    values = {name: value + change for name, change in effect.items()}
    row = next(iter(scores.values()))
    metric = f"over {'+'.join(dict.fromkeys(arms))} in per cent"
    return Score(DELTA, row.data, row.protocol, Measure(metric, values, NUMBER), CLEAN)


def _inside(task: DenseTask, prediction: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the part of a map that belongs to the image and not to its padding; a whole image's output unchanged."""
    return prediction[..., : size[0], : size[1]] if isinstance(task, MapTask) else prediction
