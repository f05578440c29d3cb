"""Evaluation of a dense run: every task of every training on the images in their fixed size, one row for each arm and task.

A row's value is the score pooled over its n, the images that have a value of the task (mean over the training seeds), its
interval the jackknife's over them (pooled.py), which for accuracy is that of the mean of right and wrong; the records hold psi
of every image, which lets arms be compared image by image, and the score of the image alone.
delta_m (metrics/delta.py) over the configuration's baseline has its interval from the same psi: the first-order effect of every
image on the scores and on the baseline's. dense_seeds.jsonl has all numbers by seed; merge.json of a training says what
merging did to its predictions. Only arms that train all tasks have a delta_m.

An image without a valid pixel of a task is passed over: it is in neither the task's score nor its n, records and interval, and
has no effect on delta_m through that task, whose n counts the images of any task. Fewer than two images with a value are an
error. What a class counts that is nowhere is the task's `absent`; with "nan" there is no score, which is an error, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt import console
from vismt.data.dense_sample import Sample, collate, size_of
from vismt.data.dense_transforms import pad
from vismt.engine import runtime
from vismt.engine.arms import Unit, arm_config, arm_names, final_units, unit_config
from vismt.engine.log import record_stem, write_lines
from vismt.engine.study_files import MERGE, fold, mergeable
from vismt.errors import UserError
from vismt.files import atomic_write, read_json
from vismt.jobs.dense.config import DELTA, SEEDS, DenseConfig, baseline_arms, trained_tasks, window_of
from vismt.jobs.dense.data import DenseData
from vismt.jobs.dense.models import fingerprint, loaded
from vismt.jobs.dense.pooled_score import PooledScore, Scored
from vismt.multitask.dense import DenseNet
from vismt.multitask.inference import predict
from vismt.multitask.metrics import delta_m
from vismt.multitask.tasks import DenseTask, MapTask
from vismt.multitask.tasks.classification import Classification
from vismt.multitask.tasks.depth import Depth
from vismt.multitask.tasks.segmentation import Segmentation
from vismt.stats import mean_interval

MEASURES = {
    "miou": "mIoU",
    "rmse": "RMSE",
    "abs_err": "mean absolute error",
    "abs_rel": "mean relative error",
    "log_rmse": "RMSE of the log",
    "mean": "mean angle in degrees",
    "ods_f": "odsF",
    "max_f": "maxF",
    "accuracy": "accuracy",
}
LENGTHS = ("rmse", "abs_err")  # measures in the unit of the target
LEAST = 1e-6  # of a score, before its logarithm
Images = dict[str, float]  # psi of each


class Evaluation:
    """What a run folder's trainings say of the samples in `data`."""

    def __init__(self, config: DenseConfig, folder: Path, config_hash: str, data: DenseData) -> None:
        self.config, self.folder, self.hash, self.data = config, folder, config_hash, data
        self.tasks = data.tasks

    def validate(self, unit: Unit) -> float:
        """Geometric mean over the tasks of the validation score, 1 / score where lower is better.

        The order of two trainings by it does not depend on the scores' units, and is to first order that by delta_m over any
        baseline; so none has to be trained before.
        """
        scored = self._scored(unit, "validation")
        logs = [
            math.log(max(one.value, LEAST)) * (-1 if self.tasks[task].lower_is_better else 1)
            for task, one in scored.items()
        ]
        return math.exp(math.fsum(logs) / len(logs))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of results.jsonl for every arm."""
        found: dict[tuple[str, str], tuple[float, Images, list[dict[str, Any]]]] = {}
        lines: list[dict[str, Any]] = []
        for arm in arm_names(self.config):
            seeds = {
                unit: self._scored(unit, self.config.evaluate.split)
                for unit in final_units(self.config, self.folder, arm)
            }
            for unit in seeds:
                self._check_merge(unit)
            for task in trained_tasks(arm_config(self.config, arm)):
                own = {unit: scored[task.name] for unit, scored in seeds.items()}
                lines += [
                    {
                        "arm": arm,
                        "seed": unit.seed,
                        "lr": unit.lr,
                        "task": task.name,
                        "measure": task.measure,
                        "value": one.value,
                        "n": len(one.images),
                        "numbers": one.numbers,
                    }
                    for unit, one in own.items()
                ]
                found[arm, task.name] = _mean(list(own.values()))
        rows = [self._row(arm, self.metric(self.tasks[task]), task, *one) for (arm, task), one in found.items()]
        for arm in arm_names(self.config):
            rows += self._delta(arm, found, lines)
        write_lines(self.folder / SEEDS, lines)
        return rows

    def metric(self, task: DenseTask) -> str:
        """The name of a task's score, with its unit."""
        metres = isinstance(task, Depth) and not task.inverse and task.measure in LENGTHS
        return f"{task.name} {MEASURES[task.measure]}" + " in m" * metres

    def _views(self) -> str:
        """How the protocol names what is averaged."""
        how, (height, width) = self.config.evaluate, window_of(self.config)
        windows = (
            "" if (height, width) == self.data.size else f", windows of {height} x {width} that share {how.overlap:g}"
        )
        return windows + ", mean with the mirrored image" * how.flip

    def _row(
        self, arm: str, metric: str, task: str, value: float, images: Images, alone: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """One row, and the records that reproduce it."""
        data, split = self.data.part(self.config.evaluate.split).name, self.config.evaluate.split
        protocol = f"{split} images at {self.data.size[0]} x {self.data.size[1]}{self._views()}"
        half = mean_interval(list(images.values()))[1]
        path = self.folder / "records" / f"{record_stem(data, protocol, arm)}-{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(
            path,
            [
                {"episode": name, "clean": psi, **({"alone": [one[name] for one in alone]} if alone else {})}
                for name, psi in images.items()
            ],
        )
        console.stage("eval", f"{arm}   {metric} {value:.4g} ± {half:.2g}   (n = {len(images):,} images)")
        return {
            "data": data,
            "protocol": protocol,
            "condition": "clean",
            "metric": metric,
            "model": arm,
            "value": value,
            "ci95": half,
            "n": len(images),
            "unit": "images",
            "seed": self.config.seed,
            "config_hash": self.hash,
            "lower_is_better": task in self.tasks and self.tasks[task].lower_is_better,
        }

    def shown(
        self, unit: Unit, numbers: Sequence[int]
    ) -> tuple[Sample, dict[str, Tensor], dict[str, list[float | None]]]:
        """Of images by number: the collated sample, and by task the merged net's logits and each image's own score, if any."""
        rows = self.data.part(self.config.evaluate.split)
        batch = collate([rows.fitted(i, self.data.size) for i in numbers])
        scored = self._scored(unit, self.config.evaluate.split)
        alone = {task: [one.alone.get(rows.ids[i]) for i in numbers] for task, one in scored.items()}
        return batch, self._logits(self._final(unit), batch), alone

    def _delta(
        self, arm: str, found: Mapping[tuple[str, str], Any], lines: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The row of delta_m of an arm with all tasks, and its lines by seed; none for the baseline itself."""
        arms = baseline_arms(self.config)
        if not arms or set(arms.values()) == {arm} or any((arm, task) not in found for task in arms):
            return []
        pairs = {task: (found[arm, task], found[base, task]) for task, base in arms.items()}
        sign = {task: -1 if self.tasks[task].lower_is_better else 1 for task in arms}
        lower = {task: self.tasks[task].lower_is_better for task in arms}
        named = "+".join(dict.fromkeys(arms.values()))
        by_seed = {(line["arm"], line["seed"], line["task"]): line for line in lines}
        gains: list[dict[str, Any]] = []
        try:
            value = delta_m(
                {t: pair[0][0] for t, pair in pairs.items()}, {t: pair[1][0] for t, pair in pairs.items()}, lower
            )
            for seed in dict.fromkeys(line["seed"] for line in lines):
                own = {task: by_seed[arm, seed, task]["value"] for task in arms}
                base = {task: by_seed[arms[task], seed, task]["value"] for task in arms}
                gains.append(
                    {
                        **by_seed[arm, seed, next(iter(arms))],
                        "task": DELTA,
                        "measure": f"over {named}, seed by seed",
                        "value": delta_m(own, base, lower),
                        "numbers": {},
                    }
                )
        except UserError as error:
            console.stage("eval", f"{arm}   no delta_m: {error}")
            return []
        lines += gains  # all or none: to a report a score without one of its seeds is a damaged file
        names = list(dict.fromkeys(name for (_, images, _), _ in pairs.values() for name in images))
        effect = dict.fromkeys(names, 0.0)
        for task, ((score, images, _), (base, others, _)) in pairs.items():
            for name, psi in images.items():  # images without a label of the task have no effect on it
                gain = (psi - score) / base - score * (others[name] - base) / base**2
                effect[name] += sign[task] * 100 / len(pairs) * gain * len(names) / len(images)
        shown = {name: value + change for name, change in effect.items()}
        return [self._row(arm, f"delta_m over {named} in per cent", DELTA, value, shown, [])]

    def _scored(self, unit: Unit, split: str) -> dict[str, Scored]:
        """Every task of one training; read from the training's folder when it was scored before."""
        path, seen = unit.folder / "records" / f"{split}.json", fingerprint(unit)
        if path.exists():
            held = read_json(path, f"run '{unit.folder}': {path.name}")
            if isinstance(held, dict) and held.get("fingerprint") == seen:
                return {task: Scored(**one) for task, one in held["tasks"].items()}
        net = self._final(unit)
        pools = {task.name: PooledScore(task) for task in trained_tasks(unit_config(self.config, unit))}
        for names, samples, batch in self._batches(split, f"{unit.arm} seed {unit.seed}"):
            logits = self._logits(net, batch)
            for task, pool in pools.items():
                key = self.tasks[task].key
                for place, (name, sample) in enumerate(zip(names, samples)):
                    if key in sample:
                        # Without the padding, which would enlarge what odsF takes for the image's diagonal.
                        own = _inside(self.tasks[task], logits[task][place : place + 1], size_of(sample))
                        pool.add(name, own, sample[key][None])
        scored = {task: pool.result() for task, pool in pools.items()}
        atomic_write(
            path, json.dumps({"fingerprint": seen, "tasks": {task: asdict(one) for task, one in scored.items()}})
        )
        return scored

    def _batches(self, split: str, told: str) -> Iterator[tuple[list[str], list[Sample], Sample]]:
        """(ids, fitted samples, the same padded and collated) of a part in its order."""
        rows, step = self.data.part(split), self.config.evaluate.batch
        for start in console.track(range(0, len(rows), step), "eval", f"{split} {told}"):
            here = range(start, min(len(rows), start + step))
            samples = [rows.unpadded(i, self.data.size) for i in here]
            yield [rows.ids[i] for i in here], samples, collate([pad(sample, self.data.size) for sample in samples])

    def _logits(self, net: DenseNet, batch: Sample) -> dict[str, Tensor]:
        how, images = self.config.evaluate, batch["image"].to(runtime.processes().device)
        with torch.no_grad():
            found = predict(net, self.tasks, images, overlap=how.overlap, flip=how.flip)
        return {task: value.cpu() for task, value in found.items()}

    def _check_merge(self, unit: Unit) -> None:
        """Compare the merged net with the unmerged one, image by image; writes merge.json once.

        The differences are those of the task where they are largest relative to its largest logit; an answer is a pixel's or
        an image's class.
        """
        net = self._final(unit)
        if not mergeable(net, unit):
            return
        plain = loaded(self.config, unit, window_of(self.config)).to(runtime.processes().device)
        found: dict[str, list[float]] = {task: [0.0, 0.0, 0] for task in net.heads}
        for _, _, batch in self._batches(self.config.evaluate.split, f"{unit.arm} seed {unit.seed}, merged and not"):
            merged, other = self._logits(net, batch), self._logits(plain, batch)
            for task, (difference, largest, answers) in found.items():
                classes = isinstance(self.tasks[task], Segmentation | Classification)
                changed = int((merged[task].argmax(1) != other[task].argmax(1)).sum()) if classes else 0
                apart = float((merged[task] - other[task]).abs().max())
                found[task] = [max(difference, apart), max(largest, float(other[task].abs().max())), answers + changed]
        worst = max(found.values(), key=lambda one: one[0] / max(one[1], LEAST))
        atomic_write(
            unit.folder / MERGE,
            json.dumps(
                {
                    "n": len(self.data.part(self.config.evaluate.split)),
                    "different_predictions": sum(one[2] for one in found.values()),
                    "largest_difference": worst[0],
                    "largest_logit": worst[1],
                    "tasks": found,
                }
            ),
        )

    def _final(self, unit: Unit) -> DenseNet:
        return fold(loaded(self.config, unit, window_of(self.config)), unit).to(runtime.processes().device)


def _inside(task: DenseTask, prediction: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of a map that is of the image and not of its padding; what is of a whole image as it is."""
    return prediction[..., : size[0], : size[1]] if isinstance(task, MapTask) else prediction


def _mean(seeds: Sequence[Scored]) -> tuple[float, Images, list[Mapping[str, Any]]]:
    """Score and psi averaged over trainings, and the images' own scores of each."""
    images = {name: math.fsum(one.images[name] for one in seeds) / len(seeds) for name in seeds[0].images}
    return math.fsum(one.value for one in seeds) / len(seeds), images, [one.alone for one in seeds]
