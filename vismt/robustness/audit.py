"""Robustness of a classifier that never saw vismt: a timm name or checkpoint, a data card, attacks -> rows and records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vismt import console
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.classifier import load_classifier
from vismt.robustness.evaluate import MaskingCheck, Row, check_masking, evaluate_classifier
from vismt.seeds import digest


class _Batches:
    """Fixed batches of the first `n` images in a seeded order; can be iterated again."""

    def __init__(self, pixels: Pixels, order: Tensor, size: int, device: torch.device) -> None:
        self.pixels, self.parts, self.device = pixels, order.split(size), device

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for part in self.parts:
            names = [self.pixels.ids[index] for index in part.tolist()]
            yield self.pixels[part].to(self.device), self.pixels.labels[part].to(self.device), names


def audit(
    model: str,
    data: str,
    specs: Sequence[AttackSpec],
    *,
    folder: Path,
    architecture: str | None = None,
    pretrained: bool = True,
    images: int | None = None,
    batch: int = 32,
    seed: int = 0,
    masking: bool = False,
    device: str | None = None,
) -> list[Row]:
    """Evaluate `model` on `data` ('card' or 'card:split'), write records.jsonl and rows.json to `folder`.

    images: how many (a seeded draw), None for all. masking: also run the first attack at growing radii and say whether
    its numbers can be believed. Raises UserError when the model's classes are not the card's.
    """
    for label, value in (("images", images), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"attack: {label} is {value}; it must be at least 1.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = load_classifier(model, architecture=architecture, pretrained=pretrained).to(where)
    name, _, split = data.partition(":")
    found = open_images(name, split or "all")
    outputs = classifier.net.num_classes
    if outputs != len(found.classes):
        raise UserError(
            f"attack: '{model}' has {outputs} outputs, '{data}' has {len(found.classes)} classes; give a checkpoint that was "
            "trained on this set's classes in the card's order."
        )
    pixels = Pixels(found, max(classifier.size))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[: images or len(found)]
    batches = _Batches(pixels, order, batch, where)
    state = b"".join(
        value.detach().cpu().float().numpy().tobytes()[:4096] for value in classifier.state_dict().values()
    )
    rows = evaluate_classifier(
        classifier,
        batches,
        specs,
        num_classes=outputs,
        records=folder / "records.jsonl",
        data=data,
        fingerprint=digest(state),
        label=f"{model} on {data}",
    )
    about = {"model": model, "data": data, "seed": seed, "rows": [{**vars(row), "ci95": row.ci95} for row in rows]}
    if masking and specs:
        about["masking"] = vars(_masked(classifier, batches, specs[0], outputs))
    atomic_write(folder / "rows.json", json.dumps(about, indent=1))
    return rows


def _masked(classifier: torch.nn.Module, batches: _Batches, spec: AttackSpec, classes: int) -> MaskingCheck:
    check = check_masking(classifier, batches, spec, num_classes=classes)
    curve = ", ".join(
        f"{255 * radius:.3g}/255: {100 * value:.1f} %" for radius, value in zip(check.epsilons, check.accuracies)
    )
    verdict = check.verdict() + ("" if check.passed else ": this attack is no evidence of robustness")
    console.stage("masking", f"accuracy by radius {curve}; {verdict}")
    return check
