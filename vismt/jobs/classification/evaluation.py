"""Evaluation of a multi-task run: a record for every image of every training, then one row for each task, arm and condition.

A row's value is the share of right answers with each image averaged over the training seeds, so that arms are compared
image by image; what the seeds do to it is in seeds.jsonl. merge.json of a training says what merging did to its answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vismt import console
from vismt.data.batching import InOrder
from vismt.engine import runtime
from vismt.engine.arms import Unit, arm_config, arm_names, final_units, unit_config
from vismt.engine.log import read_lines, record_stem, write_lines
from vismt.engine.study_files import MERGE, fold, mergeable
from vismt.files import atomic_write
from vismt.jobs.classification.config import MultitaskConfig
from vismt.jobs.classification.data import TaskData
from vismt.jobs.classification.models import PixelNet, loaded
from vismt.multitask.union import TaskClassifier
from vismt.robustness.conditions import Condition, summary
from vismt.robustness.evaluate import evaluate_classifier
from vismt.seeds import digest
from vismt.stats import mean_interval

SEEDS = "seeds.jsonl"


class Evaluation:
    """What a run folder's trainings say of the images in `data`."""

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str, data: TaskData) -> None:
        self.config, self.folder, self.hash, self.data = config, folder, config_hash, data

    def validate(self, unit: Unit) -> float:
        """Mean over the tasks of the clean accuracy on their validation images."""
        net = self._final(unit)
        values = [self._evaluate(net, unit, task, "validation", [], "") for task in self.data.union.tasks]
        return sum(sum(rows["clean"].values()) / len(rows["clean"]) for rows in values) / len(values)

    def rows(self, specs: Sequence[Condition], own: bool) -> list[dict[str, Any]]:
        """Rows of results.jsonl for every arm. own: the configuration's conditions, with which the merge is checked, too."""
        apart = (
            ""
            if own
            else "-" + digest(json.dumps([dict(spec.settings()) for spec in specs], sort_keys=True).encode())[:8]
        )
        found, lines = [], []
        for arm in arm_names(self.config):
            units = final_units(self.config, self.folder, arm)
            values: dict[str, dict[str, list[dict[str, float]]]] = {}
            for unit in units:
                net = self._final(unit)
                for task in self.data.union.tasks:
                    seen = self._evaluate(net, unit, task, self.config.evaluate.split, specs, apart)
                    for condition, right in seen.items():
                        values.setdefault(task, {}).setdefault(condition, []).append(right)
                        value, n = sum(right.values()) / len(right), len(right)
                        lines.append(
                            {
                                "arm": arm,
                                "seed": unit.seed,
                                "lr": unit.lr,
                                "data": task,
                                "condition": condition,
                                "value": value,
                                "n": n,
                            }
                        )
                if own and mergeable(net, unit):
                    self._check_merge(net, unit)
            for task, by_condition in values.items():
                found += self._task_rows(task, arm, by_condition, apart)
        if own:
            write_lines(self.folder / SEEDS, lines)
        return found

    def _task_rows(
        self, task: str, arm: str, by_condition: Mapping[str, Sequence[Mapping[str, float]]], apart: str
    ) -> list[dict[str, Any]]:
        """Rows of one task and arm, and the records that reproduce them."""
        asked = f"one of {self.data.union.num_classes} classes"
        if arm_config(self.config, arm).head == "separate":
            asked = "task told"
        protocol = f"{self.config.evaluate.split} images, {asked}"
        records: dict[str, dict[str, Any]] = {}
        rows = []
        for condition, seeds in by_condition.items():
            means = {name: sum(right[name] for right in seeds) / len(seeds) for name in seeds[0]}
            value, half = mean_interval(list(means.values()))
            rows.append(
                {
                    "data": task,
                    "protocol": protocol,
                    "condition": condition,
                    "metric": "accuracy",
                    "model": arm,
                    "value": value,
                    "ci95": half,
                    "n": len(means),
                    "unit": "images",
                    "seed": self.config.seed,
                    "config_hash": self.hash,
                }
            )
            for name, mean in means.items():
                records.setdefault(name, {"episode": name})[condition] = mean
        path = self.folder / "records" / f"{record_stem(task, protocol, arm)}{apart}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, list(records.values()))
        count = f"n = {len(records):,} images, {len(next(iter(by_condition.values())))} seed(s)"
        console.stage(
            "eval", f"{task}  {arm}   {summary([(r['condition'], r['value'], r['ci95']) for r in rows])}   ({count})"
        )
        return rows

    def _evaluate(
        self, net: PixelNet, unit: Unit, task: str, split: str, specs: Sequence[Condition], apart: str
    ) -> dict[str, dict[str, float]]:
        """{condition: {image: 1 right, 0 wrong}}; images that are on record are not evaluated again."""
        union, number = self.data.union, self.data.union.tasks.index(task)
        path = unit.folder / "records" / f"{split}-{task}{apart}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        evaluate_classifier(
            TaskClassifier(net, union, number, unit_config(self.config, unit).head == "separate").eval(),
            InOrder(self.data.part(number, split), self.config.evaluate.batch),
            specs,
            num_classes=union.num_classes,
            records=path,
            data=f"{task}:{split}",
            fingerprint=net.fingerprint(),
            label=f"{task} {unit.arm} seed {unit.seed}",
        )
        strict = {"clean": False, **{spec.describe(union.num_classes): spec.worst_case for spec in specs}}
        rows = [row for row in read_lines(path) if "id" in row]
        # An attack counts where the clean image is right as well, see robustness.evaluate.
        return {
            condition: {
                row["id"]: float(row[condition] == row["label"] and (not both or row["clean"] == row["label"]))
                for row in rows
            }
            for condition, both in strict.items()
        }

    def _check_merge(self, net: PixelNet, unit: Unit) -> None:
        """Compare the merged net with the unmerged one, image by image; writes merge.json once."""
        device = runtime.processes().device
        plain = loaded(self.config, unit, self.data.union.num_classes).to(device)
        found = {"n": 0, "different_predictions": 0, "largest_difference": 0.0, "largest_logit": 0.0}
        for number, task in enumerate(self.data.union.tasks):
            batches = InOrder(self.data.part(number, self.config.evaluate.split), self.config.evaluate.batch)
            for images, _, _ in console.track(batches, "merge", f"{task} {unit.arm} seed {unit.seed}, merged and not"):
                with torch.no_grad():
                    merged, other = net(images.to(device)), plain(images.to(device))
                found["n"] += len(images)
                found["different_predictions"] += int((merged.argmax(1) != other.argmax(1)).sum())
                found["largest_difference"] = max(found["largest_difference"], float((merged - other).abs().max()))
                found["largest_logit"] = max(found["largest_logit"], float(other.abs().max()))
        atomic_write(unit.folder / MERGE, json.dumps(found))

    def _final(self, unit: Unit) -> PixelNet:
        return fold(loaded(self.config, unit, self.data.union.num_classes), unit).to(runtime.processes().device)
