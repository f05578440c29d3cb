"""Clean and robust accuracy of any image classifier, one record per example, and checks that the numbers can be believed.

Under an attack an example counts when the model is right on the clean image and on the attacked one: the unchanged image
is inside every budget (the convention of RobustBench, arXiv 2010.09670). Under a corruption the corrupted image alone
counts. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from vismt import console
from vismt.errors import UserError
from vismt.records import Records
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.classifier import load_classifier
from vismt.robustness.corruptions import CorruptionSpec
from vismt.seeds import mix_seed

__all__ = ["MaskingCheck", "Row", "check_masking", "evaluate_classifier", "load_classifier", "summarise", "wilson"]

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[str]]


@dataclass(frozen=True)
class Row:
    """Accuracy under one condition: value and its 95 % interval [low, high] over n images; chance is 1 / num_classes."""

    condition: str
    value: float
    low: float
    high: float
    n: int
    chance: float
    unit: str = "images"

    @property
    def ci95(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of `correct` out of `n` > 0."""
    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Batch],
    specs: Sequence[AttackSpec | CorruptionSpec],
    *,
    num_classes: int,
    records: Path | None = None,
    data: str = "data",
    fingerprint: str = "",
    label: str = "robustness",
) -> list[Row]:
    """Rows "clean" and one per attack or corruption.

    model: images float (b, 3, h, w) in [0, 1] -> logits (b, num_classes), normalisation included; left as found.
    batches: (images, labels (b,)) or (images, labels, ids), in the same order and sizes at every call; ids are running
    numbers by default. records: JSON lines with id, label, the predictions "clean" and "<condition>", and the distances
    "<condition> linf" and "<condition> l2", written batch by batch; an interrupted run goes on with what it lacks. data and
    fingerprint (the caller's names for the images and the weights) keep different runs out of one file.
    Raises UserError for no example, labels or logits that do not fit num_classes, pixels outside [0, 1], a foreign file.
    """
    conditions = {spec.describe(num_classes): spec for spec in specs}
    if len(conditions) < len(specs):
        raise UserError(f"evaluate {data}: two attacks are called alike in {list(conditions)}: leave one out.")
    settings = {
        "data": data,
        "fingerprint": fingerprint,
        "num_classes": num_classes,
        "attacks": [dict(spec.settings()) for spec in specs],
    }
    known = Records(records, settings, ("label", "clean", *conditions), key="id")
    rows: dict[str, dict] = {}
    with known, console.bar("eval", label, len(batches) if isinstance(batches, Sized) else 0) as bar:
        for number, batch in enumerate(batches):
            images, labels = batch[0], torch.as_tensor(batch[1])
            ids = (
                [str(name) for name in batch[2]] if len(batch) > 2 else [str(len(rows) + i) for i in range(len(labels))]
            )
            _check_batch(images, labels, ids, rows, known, num_classes)
            if not all(name in known for name in ids):
                for row in _examples(model, images, labels, ids, conditions, num_classes, number):
                    known.add(row)
            rows |= {name: known[name] for name in ids}
            bar.advance()
    worst_case = {condition: spec.worst_case for condition, spec in conditions.items()}
    return summarise(list(rows.values()), worst_case, num_classes)


def summarise(rows: Sequence[Mapping], worst_case: Mapping[str, bool], num_classes: int) -> list[Row]:
    """Per-example records to rows: "clean", then each condition of `worst_case`, where True asks for right when clean too."""
    if not rows:
        raise UserError("evaluate: the data has no example: check its split.")
    right = [row["clean"] == row["label"] for row in rows]
    table = []
    for condition in ("clean", *worst_case):
        strict = worst_case.get(condition, False)
        hits = (row[condition] == row["label"] for row in rows)
        correct = sum(hit and (ok or not strict) for hit, ok in zip(hits, right, strict=True))
        low, high = wilson(correct, len(rows))
        table.append(Row(condition, correct / len(rows), low, high, len(rows), 1 / num_classes))
    return table


def _check_batch(
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    seen: Mapping[str, dict],
    known: Records,
    num_classes: int,
) -> None:
    if not len(labels) == len(images) == len(ids) or not len(ids):
        raise UserError(f"evaluate: a batch has {len(images)} images, {len(labels)} labels and {len(ids)} ids.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(
            f"evaluate: labels {int(labels.min())} to {int(labels.max())} for {num_classes} classes: the data has other "
            "classes than the model."
        )
    twice = sorted(set(ids) & seen.keys()) if len(set(ids)) == len(ids) else [x for x in ids if ids.count(x) > 1]
    if twice:
        raise UserError(f"evaluate: the id '{twice[0]}' comes twice: give every example its own.")
    for name, label in zip(ids, labels.tolist(), strict=True):
        if name in known and known[name]["label"] != label:
            raise UserError(f"evaluate: '{name}' is on record with label {known[name]['label']}, now it has {label}.")


def _examples(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    conditions: Mapping[str, AttackSpec | CorruptionSpec],
    num_classes: int,
    number: int,
) -> list[dict]:
    device = next((p.device for p in model.parameters()), images.device)
    images, labels = images.to(device), labels.to(device)
    rows = [{"id": name, "label": int(label)} for name, label in zip(ids, labels.tolist(), strict=True)]
    columns = {"clean": _predict(model, images, num_classes).tolist()}
    for condition, spec in conditions.items():
        seed = mix_seed(spec.seed, number)
        found = spec.perturb(model, images, labels, num_classes=num_classes, seed=seed)
        change = (found - images).flatten(1).float()
        columns[condition] = _predict(model, found, num_classes).tolist()
        columns[f"{condition} linf"] = change.abs().amax(1).tolist()
        columns[f"{condition} l2"] = change.norm(dim=1).tolist()
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        logits = model(images)
    finally:
        for part, training in modes:
            part.training = training
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise UserError(f"evaluate: logits {tuple(logits.shape)} for {num_classes} classes: the head does not fit.")
    return logits.argmax(1)


@dataclass(frozen=True)
class MaskingCheck:
    """Accuracy by radius over n images (episodes), and whether it behaves as it must when the attack has honest gradients.

    monotone: no increase from one radius to the next beyond noise; reaches_chance: at the largest radius the accuracy is
    not significantly above chance. Where one of them fails, the robust accuracy of this attack is not evidence.
    """

    epsilons: tuple[float, ...]
    accuracies: tuple[float, ...]
    chance: float
    n: int
    monotone: bool
    reaches_chance: bool

    @property
    def passed(self) -> bool:
        return self.monotone and self.reaches_chance

    def verdict(self) -> str:
        """ "pass", or what is wrong."""
        faults = []
        if not self.monotone:
            rises = [later - earlier for earlier, later in pairwise(self.accuracies)]
            at = rises.index(max(rises))
            faults.append(
                f"rises from {100 * self.accuracies[at]:.1f} % at {255 * self.epsilons[at]:.3g}/255 to "
                f"{100 * self.accuracies[at + 1]:.1f} % at {255 * self.epsilons[at + 1]:.3g}/255"
            )
        if not self.reaches_chance:
            last = f"{100 * self.accuracies[-1]:.1f} % at {255 * self.epsilons[-1]:.3g}/255"
            faults.append(f"still {last}, chance is {100 * self.chance:.1f} %")
        return f"FAIL: {'; '.join(faults)}" if faults else "pass"


def check_masking(
    model: nn.Module,
    batches: Sequence[Batch],
    spec: AttackSpec,
    *,
    num_classes: int,
    epsilons: Sequence[float] | None = None,
    slack: float = 0.02,
) -> MaskingCheck:
    """Run `spec` at growing radii over the same batches (a re-iterable): 0, half, once and twice its own, and 64/255.

    epsilons: other radii (in l2 give your own: 64/255 is small there). Each keeps spec's step relative to its radius. One
    pass of clean and attacked predictions per radius.
    """
    default = (0.0, spec.epsilon / 2, spec.epsilon, 2 * spec.epsilon, 64 / 255)
    radii = sorted(set(default if epsilons is None else epsilons))
    rows = []
    for radius in radii:
        step = None if spec.step_size is None else spec.step_size * radius / spec.epsilon
        at_radius = replace(spec, epsilon=radius, step_size=step or None)
        rows.append(evaluate_classifier(model, batches, [at_radius], num_classes=num_classes, label=str(at_radius))[1])
    values = tuple(row.value for row in rows)
    return MaskingCheck(
        tuple(radii),
        values,
        1 / num_classes,
        rows[-1].n,
        monotone=all(later <= earlier + slack for earlier, later in pairwise(values)),
        reaches_chance=rows[-1].low <= 1 / num_classes,
    )
