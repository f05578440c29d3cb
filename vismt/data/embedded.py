"""Real images that arrive with a pip package: scikit-learn's digits and crops of scikit-image's photographs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from vismt.data.cards import Card
from vismt.data.decode import decode_file
from vismt.data.manifest import digest
from vismt.data.source_types import DigitsSource, PhotoCropsSource
from vismt.data.sources import Loaded, fix, verify_classes, verify_counts
from vismt.errors import UserError

HALVES = ("train", "test")
# Powers of the inverse root of x^4 = x + 1: an additive sequence that fills the (position, position, size) cube evenly.
STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)
SIDE_FROM, SIDE_SPAN = 0.45, 0.4


def digits_files(source: DigitsSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """scikit-learn's one data file."""
    name = "datasets/data/digits.csv.gz"
    return {"digits": [(name, base / name)] if (base / name).is_file() else []}


def load_digits(card: Card, source: DigitsSource, base: Path, split: str) -> Loaded:
    """All 1,797 digits as uint8 (3, 8, 8); the 17 grey levels 0..16 become round(level * 255 / 16)."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    levels = torch.from_numpy(bunch.images).to(torch.float64)
    images = (levels * 255 / 16).round().to(torch.uint8)
    labels = [int(label) for label in bunch.target]
    verify_counts(card, source, base, {"all": len(labels)}, {})
    classes = [str(name) for name in bunch.target_names]
    verify_classes(card, source, base, len(classes))
    return Loaded(
        classes=classes,
        labels=labels,
        ids=[f"all/{row:06d}" for row in range(len(labels))],
        read=lambda i: images[i].expand(3, -1, -1).contiguous(),
        content=lambda: hashlib.sha256(images.numpy().tobytes()).hexdigest(),
    )


def crop_boxes(height: int, width: int, half: str, count: int) -> list[tuple[int, int, int]]:
    """`count` boxes (top, left, side) inside one half of a photograph; 'train' and 'test' share no pixel.

    The halves lie left and right, or above and below in an upright photograph; an odd middle line is in neither. Sides
    are 0.45 to 0.85 of the half's shorter side. The boxes are a fixed additive sequence: no random numbers.
    """
    upright = height > width
    rows, columns = (height // 2, width) if upright else (height, width // 2)
    first = half == HALVES[0]
    top0 = height - rows if upright and not first else 0
    left0 = width - columns if not upright and not first else 0
    boxes = []
    for i in range(count):
        step = i + 1 + (0 if first else count)
        u, v, s = ((0.5 + step * alpha) % 1.0 for alpha in STEPS)
        side = max(1, round(min(rows, columns) * (SIDE_FROM + SIDE_SPAN * s)))
        boxes.append((top0 + int(u * (rows - side + 1)), left0 + int(v * (columns - side + 1)), side))
    return boxes


def photo_files(source: PhotoCropsSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The photographs, each a group of its own name."""
    paths = {name: (file, base / "data" / file) for name, file in source.photographs.items()}
    return {name: [entry] if entry[1].is_file() else [] for name, entry in paths.items()}


def load_photo_crops(card: Card, source: PhotoCropsSource, base: Path, split: str) -> Loaded:
    """Square crops, uint8 (3, side, side), class = photograph; ids are `<split>/<photograph>/<crop>`.

    Only files inside the installed package are read; a photograph that is not there is a UserError (never a download).
    """
    found = photo_files(source, base)
    absent = next((name for name, entries in found.items() if not entries), None)
    if absent is not None:
        raise UserError(f"{card.shown}: the installed scikit-image has no '{source.photographs[absent]}'. {fix(card)}")
    paths = {name: entries[0][1] for name, entries in found.items()}

    @functools.cache
    def photograph(name: str) -> Tensor:
        return decode_file(paths[name])

    classes = list(paths)
    verify_classes(card, source, base, len(classes))
    entries = [
        (half, label, k)
        for half in (HALVES if split == "all" else (split,))
        for label in range(len(classes))
        for k in range(source.crops_per_half)
    ]
    counts = {half: sum(entry[0] == half for entry in entries) for half in dict.fromkeys(e[0] for e in entries)}
    verify_counts(card, source, base, counts, {})

    def read(i: int) -> Tensor:
        half, label, k = entries[i]
        image = photograph(classes[label])
        top, left, side = crop_boxes(image.shape[1], image.shape[2], half, source.crops_per_half)[k]
        return image[:, top : top + side, left : left + side].contiguous()

    return Loaded(
        classes=classes,
        labels=[label for _, label, _ in entries],
        ids=[f"{half}/{classes[label]}/{k:03d}" for half, label, k in entries],
        read=read,
        content=lambda: f"{digest([(n, p) for n, p in paths.items()]).sha256}:{source.crops_per_half}:{STEPS}:{split}",
    )
