"""A classifier of images on one set: accuracy, quality of the probabilities and features, from a record of every image.

The values of an accuracy are 1 for a right answer and 0 for a wrong answer. Records are kept, and images on record are not
evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vismt.data.batching import Images, InOrder
from vismt.data.set_entries import row_name
from vismt.engine.log import record_stem
from vismt.evaluation.quality import ACCURACY
from vismt.evaluation.sections import asked_scores
from vismt.robustness.conditions import DirectPerturbation, condition_of
from vismt.robustness.evaluate import ImageQuestions, Keep, accuracies
from vismt.uncertainty.features import Feature, Rows, View
from vismt.uncertainty.intervals import CLEAN, Condition, Measure, Score


@dataclass(frozen=True, kw_only=True)
class ImageView(View):
    """A classifier of images on one evaluated set. The jobs that have one extend it by what they provide.

    Args:
        net: Function from images (b, 3, h, w) in [0, 1] to logits (b, num_classes).
        batches: The evaluated images, in batches.
        task, data: Names of the task and the set in scores.
        part: Name of the examples, which begins the protocol of scores.
        choice: Classes among which a class is chosen.
        records: File of records. The records of a further set are beside it.
        source: Name of the images in the record.
        fingerprint: Fingerprint of the weights.
        label: Text of the progress bar.
        opened: Function that returns the images of a set of other classes, by its entry.
        chance: Score of a guess, None for a trained net.
    """

    net: nn.Module
    batches: InOrder
    num_classes: int
    task: str
    data: str
    part: str
    choice: str
    records: Path
    source: str
    fingerprint: str
    label: str
    opened: Callable[[str], AbstractContextManager[Images]]
    chance: float | None = None

    def scores(
        self,
        specs: Sequence[DirectPerturbation] = (),
        features: Sequence[Feature] = (),
        keep: Keep | None = None,
    ) -> list[Score]:
        """Return the accuracy clean and under each condition, and the scores of features.

        features: Fitted features. keep: Argument of `evaluate_examples`.
        """
        rows = self.rows(ImageQuestions(self.num_classes, specs, features, keep, self.source))
        measures = [
            (condition, Measure(ACCURACY, values, counts=True, chance=self.chance))
            for condition, values in accuracies(rows.rows, specs, self.num_classes)
        ]
        found = [self.score(rows.grouped(measure), condition, rows.content) for condition, measure in measures]
        asked = ((CLEAN, False), *((condition_of(spec, self.num_classes), spec.worst_case) for spec in specs))
        outside = partial(self.outside, features)
        return found + asked_scores(features, self, replace(rows, asked=asked), outside)

    def rows(self, questions: ImageQuestions) -> Rows:
        """Return the record of the images, which is completed."""
        log = questions.records(self.records, self.fingerprint, self.batches.images.content)
        rows = questions.answered(self.net, self.batches, log, self.label)
        return Rows(rows, *self.batches.groups, log.examples)

    def outside(self, features: Sequence[Feature], entry: str) -> Rows:
        """Return the columns of features of the images of a set of other classes."""
        name = row_name(entry)
        with self.opened(entry) as images:
            unlabelled = torch.zeros(len(images), dtype=torch.int64)
            other = replace(
                self,
                batches=InOrder(images, self.batches.batch, labels=unlabelled),
                records=self.records.with_name(f"{record_stem(self.records.stem, name, 'outside')}.jsonl"),
                label=f"{name} against {self.label}",
            )
            columns = [of for of in features if any(one.outside == entry for one in of.quantities())]
            return other.rows(ImageQuestions(self.num_classes, features=columns, data=name))

    def score(self, measure: Measure, condition: Condition, examples: str, about: str = "") -> Score:
        protocol = ", ".join(filter(None, (self.part, about or self.choice)))
        return Score(self.task, self.data, protocol, measure, condition, examples=examples)
