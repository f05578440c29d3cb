"""Evaluation of a multi-task run: scores are read from a record of every image of every training.

A score's values are 1 for a right answer and 0 for a wrong one. Records are kept in the training's folder, and images on
record are not evaluated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vismt import console, ranks
from vismt.data.batching import InOrder
from vismt.engine import runtime
from vismt.engine.study import Training
from vismt.jobs.classification.config import MultitaskConfig
from vismt.jobs.classification.data import TaskData
from vismt.jobs.classification.models import PixelNet
from vismt.multitask.union import TaskClassifier
from vismt.report.results import Score
from vismt.robustness.conditions import DirectPerturbation
from vismt.robustness.evaluate import accuracies, evaluate_examples
from vismt.stats import Measure


class Evaluation:
    """Scores of nets on the images of all tasks."""

    def __init__(self, config: MultitaskConfig, data: TaskData) -> None:
        self.config = config
        self.data = data

    def scores(
        self,
        net: PixelNet,
        training: Training,
        separate: bool,
        split: str,
        specs: Sequence[DirectPerturbation],
        records: Path,
    ) -> list[Score]:
        """Return the accuracy of every task, clean and under each condition.

        separate: whether the net chooses among the classes of the image's task only. records: the folder of records.
        """
        protocol = "task known" if separate else f"one of {self.data.union.num_classes} classes"
        scores = []
        for number, task in enumerate(self.data.union.tasks):
            path = records / f"{split}-{task}.jsonl"
            classifier = TaskClassifier(net, self.data.union, number, separate).eval()
            label = f"{task} {training.arm} seed {training.seed}"
            rows = self._evaluate(net, classifier, number, split, specs, path, label)
            for condition, values in accuracies(rows, specs, self.data.union.num_classes):
                measure = Measure("accuracy", values)
                scores.append(Score("classification", task, f"{split} images, {protocol}", measure, condition))
        return scores

    def _evaluate(
        self,
        net: PixelNet,
        classifier: TaskClassifier,
        number: int,
        split: str,
        specs: Sequence[DirectPerturbation],
        path: Path,
        label: str,
    ) -> list[dict]:
        """Return the records of a task's images; those on record are not evaluated again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return evaluate_examples(
            classifier,
            InOrder(self.data.part(number, split), self.config.evaluate.batch),
            specs,
            num_classes=self.data.union.num_classes,
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
