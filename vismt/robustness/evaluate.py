"""Clean and robust accuracy of an image classifier, with a record for each example.

Under an attack, an example counts as right if the model is right on the clean image and on the attacked image, because the
unchanged image is inside every budget (the convention of RobustBench, arXiv 2010.09670). Under a corruption, only the corrupted
image counts. Intervals are Wilson's at 95 %.

Features of the evaluation record columns of their own. Processes that share an evaluation
(vismt/base/ranks.py) run a batch each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vismt.base import ranks
from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.lowrank.contexts import evaluating
from vismt.metatune.functional import answers, report_lost
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import DirectPerturbation, Perturbation, condition_of, worst_cases
from vismt.storage.records import Field, Header, Records
from vismt.uncertainty.features import Answers, Feature, feature_columns, feature_fields, feature_settings
from vismt.uncertainty.intervals import CLEAN, Condition, wilson

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[str]]
Keep = Callable[[str, int, Mapping[str, np.ndarray]], object]


@dataclass(frozen=True)
class ConditionAccuracy:
    """Accuracy under one condition.

    The value and its 95 % interval [low, high] are in [0, 1], over n images. chance: Accuracy of guessing, 1 / num_classes.
    """

    condition: str
    value: float
    low: float
    high: float
    n: int
    chance: float
    unit: str = "images"

    @property
    def ci95(self) -> float:
        """Half of the width of the interval."""
        return (self.high - self.low) / 2


def evaluate_classifier(
    model: nn.Module, batches: Iterable[Batch], specs: Sequence[DirectPerturbation], *, num_classes: int, **options: Any
) -> list[ConditionAccuracy]:
    """Evaluate a classifier on clean images and under every condition of `specs`.

    Arguments, options and errors are as in `evaluate_examples`.

    Returns:
        The accuracy "clean", then the accuracy under each of `specs` in their order.
    """
    rows = evaluate_examples(model, batches, specs, num_classes=num_classes, **options)
    table = []
    for condition, values in accuracies(rows, specs, num_classes)[: 1 + len(specs)]:  # the worst cases follow
        correct, n = round(sum(values.values())), len(values)
        table.append(ConditionAccuracy(condition.label, correct / n, *wilson(correct, n), n, 1 / num_classes))
    return table


def evaluate_examples(
    model: nn.Module,
    batches: Iterable[Batch],
    specs: Sequence[DirectPerturbation],
    *,
    num_classes: int,
    features: Sequence[Feature] = (),
    records: Path | None = None,
    data: str = "data",
    fingerprint: str = "",
    examples: str = "",
    label: str = "robustness",
    keep: Keep | None = None,
) -> list[dict]:
    """Return a record for every example, clean and under every condition of `specs`.

    Args:
        model: Module from images float (b, 3, h, w) in [0, 1] to logits (b, num_classes), normalisation included. Its mode and
            its parameters' flags are restored afterwards.
        batches: Batches (images, labels (b,)) or (images, labels, ids), in the same order and sizes at every call. Ids are
            running numbers by default.
        specs: Attacks and corruptions with different texts.
        num_classes: Number of logits. Labels are 0..num_classes-1.
        features: Features of the evaluation, which record their own columns (vismt/evaluation).
        records: Line file, written batch by batch. An interrupted run continues with the batches that are missing.
        data: The caller's name for the images. A file of other images is refused.
        fingerprint: The caller's name for the weights. A file of other weights is refused.
        examples: Text that tells the images from others of the same names. A file of other images is refused.
        label: Text of the progress bar.
        keep: Function that is called with each attack's text, the number of the batch and its arrays: "ids", "labels" int64
            (b,), "clean" and "attacked" float32 (b, 3, h, w), and "answers" int64 (b,) on the attacked images.

    Returns:
        Records in the order of the examples. Each has id, label, the predictions "clean" and "<condition>", and the distances
        "<condition> linf" and "<condition> l2". For an attack, "<condition> lost" is 1 if the attack counted an image as broken
        that is right here, by rounding. Each feature adds its columns, such as "clean confidence". Some features have columns
        for every condition, or for every form of the clean logits.

    Raises:
        UserError: If no example is given, labels or logits do not fit num_classes, pixels are outside [0, 1], two conditions have
            the same text, the model answers differently from call to call, or the records are of another run.
    """
    questions = ImageQuestions(num_classes, specs, features, keep, data)
    log = questions.records(records, fingerprint, examples)
    return questions.answered(model, batches, log, label)


def _loads(batches: Iterable[Batch]) -> Iterator[Callable[[], Batch]]:
    """Yield a function for every batch that returns the batch. A batch of a sequence is read when the function is called."""
    if isinstance(batches, Sized) and hasattr(batches, "__getitem__"):
        yield from (partial(batches.__getitem__, number) for number in range(len(batches)))
    else:
        yield from (lambda batch=batch: batch for batch in batches)


@dataclass(frozen=True)
class ImageQuestions:
    """What is recorded of every image. The fields are arguments of `evaluate_examples`."""

    num_classes: int
    specs: Sequence[DirectPerturbation] = ()
    features: Sequence[Feature] = ()
    keep: Keep | None = None
    data: str = "data"

    @property
    def conditions(self) -> dict[str, DirectPerturbation]:
        """The attacks and corruptions by their texts."""
        found = {spec.describe(self.num_classes): spec for spec in self.specs}
        if len(found) < len(self.specs):
            raise UserError(f"evaluate {self.data}: two conditions have the same text in {list(found)}: leave one out.")
        return found

    def records(self, path: Path | None, weights: str, examples: str) -> Records:
        """Open the records in a file. weights, examples: Fields of `vismt.storage.records.Header`."""
        settings = {
            "attacks": [dict(spec.settings()) for spec in self.specs],
            "features": feature_settings(self.features),
        }
        header = Header(weights, examples, {"data": self.data, "num_classes": self.num_classes}, settings)
        return Records(path, header, self._fields())

    def answered(self, model: nn.Module, batches: Iterable[Batch], log: Records, label: str) -> list[dict]:
        """Return the records of all images. Records in `log` are read from it. Errors are as in `evaluate_examples`."""
        running = count()

        def run(numbered: tuple[int, Callable[[], Batch]]) -> tuple[list[str], list[dict]]:
            number, load = numbered
            batch = load()
            images, labels = batch[0], torch.as_tensor(batch[1])
            if len(batch) < 3 and ranks.count() > 1:
                raise UserError(
                    "evaluate: batches without ids have no numbers in several processes; give every example an id."
                )
            ids = [str(name) for name in (batch[2] if len(batch) > 2 else islice(running, len(labels)))]
            _check_batch(images, labels, ids, self.num_classes)
            _check_labels(ids, labels.tolist(), log)
            known = all(name in log for name in ids)
            return ids, [] if known else self._rows(model, images, labels, ids, number)

        total = len(batches) if isinstance(batches, Sized) else 0
        rows = log.add_batches(enumerate(_loads(batches)), run, label, total)
        if not rows:
            raise UserError("evaluate: the data has no example: check its split.")
        report_lost(rows, self._lost())
        return rows

    def _lost(self) -> dict[str, str]:
        return {name: f"{name} lost" for name, spec in self.conditions.items() if isinstance(spec, AttackSpec)}

    def _fields(self) -> dict[str, Field]:
        """Return the fields of a record besides its id."""
        answer, distance = Field(0, self.num_classes - 1, whole=True), Field(0)
        fields = {"label": answer, "clean": answer}
        for name in self.conditions:
            fields.update({name: answer, f"{name} linf": distance, f"{name} l2": distance})
        fields.update(dict.fromkeys(self._lost().values(), Field(0, 1, whole=True)))
        fields |= feature_fields((CLEAN.label, *self.conditions), self.features, self.num_classes)
        return fields

    def _rows(self, model: nn.Module, images: Tensor, labels: Tensor, ids: Sequence[str], number: int) -> list[dict]:
        classes = self.num_classes

        net = partial(_logits, model, num_classes=classes)

        def asked(condition: str, logits: Tensor, images: Tensor) -> dict[str, list]:
            found = Answers(logits.cpu().double(), labels.cpu(), net, images, [(name,) for name in ids])
            return feature_columns(condition, self.features, found)

        device = next((p.device for p in model.parameters()), images.device)
        images, labels = images.to(device), labels.to(device)
        logits = _logits(model, images, classes)
        columns: dict[str, list] = {"id": list(ids), "label": labels.tolist(), "clean": logits.argmax(1).tolist()}
        columns |= asked(CLEAN.label, logits, images)
        for condition, spec in self.conditions.items():
            keys = batch_keys(spec, number, len(images))
            if isinstance(spec, AttackSpec):
                outcome = spec.search(model, images, labels, num_classes=classes, keys=keys)
                perturbed = outcome.adversarial
            else:
                perturbed = spec.perturb(model, images, labels, num_classes=classes, keys=keys)
            change = (perturbed - images).flatten(1).float()
            attacked = _logits(model, perturbed, classes)
            if isinstance(spec, AttackSpec):
                columns[f"{condition} lost"] = outcome.lost(attacked, condition).int().tolist()
                if self.keep is not None:
                    kept = {"labels": labels, "clean": images, "attacked": perturbed, "answers": attacked.argmax(1)}
                    arrays = {name: values.cpu().numpy() for name, values in kept.items()}
                    self.keep(condition, number, {"ids": np.array(ids, dtype=str), **arrays})
            columns[condition] = attacked.argmax(1).tolist()
            columns |= asked(condition, attacked, perturbed)
            columns[f"{condition} linf"] = change.abs().amax(1).tolist()
            columns[f"{condition} l2"] = change.norm(dim=1).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def accuracies(
    rows: Sequence[Mapping], specs: Sequence[Perturbation], num_classes: int
) -> list[tuple[Condition, dict[str, float]]]:
    """Return 1.0 for a right and 0.0 for a wrong answer, by image id, for clean images, each spec and each worst case.

    Under an attack, the clean image also has to be right. rows: Records of the examples of `evaluate_classifier`.
    """
    conditions: list[tuple[Condition, bool, tuple[str, ...]]] = [(CLEAN, False, (CLEAN.label,))]
    for spec in specs:
        condition = condition_of(spec, num_classes)
        conditions.append((condition, spec.worst_case, (condition.label,)))
    conditions += [(worst.condition, True, worst.attacks) for worst in worst_cases(specs, num_classes)]

    def right(row: Mapping, labels: Sequence[str], strict: bool) -> float:
        answers = [row[label] for label in (*labels, *(["clean"] if strict else []))]
        return float(all(answer == row["label"] for answer in answers))

    return [(at, {row["id"]: right(row, labels, strict) for row in rows}) for at, strict, labels in conditions]


def _check_batch(images: Tensor, labels: Tensor, ids: Sequence[str], num_classes: int) -> None:
    if not len(labels) == len(images) == len(ids) or not len(ids):
        raise UserError(f"evaluate: a batch has {len(images)} images, {len(labels)} labels and {len(ids)} ids.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(
            f"evaluate: labels {int(labels.min())} to {int(labels.max())} for {num_classes} classes: the data has other "
            "classes than the model."
        )


def _check_labels(ids: Sequence[str], labels: Sequence[int], log: Records) -> None:
    for name, label in zip(ids, labels, strict=True):
        if name in log and log[name]["label"] != label:
            raise UserError(f"evaluate: '{name}' is on record with label {log[name]['label']}, now it has {label}.")


def batch_keys(spec: DirectPerturbation, number: int, count: int) -> list[tuple[int, int]]:
    """Return the keys of the images of batch `number` under a condition. Random numbers are functions of these keys."""
    return [(mix_seed(spec.seed, number), position) for position in range(count)]


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    with evaluating(model):
        logits = answers(model, images)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise UserError(f"evaluate: logits {tuple(logits.shape)} for {num_classes} classes: the head does not fit.")
    return logits
