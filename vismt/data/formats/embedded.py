"""Real images inside pip packages: scikit-learn's digits and crops of scikit-image's photographs."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.typed import RelativePath
from vismt.data.copies import fix, verify_classes, verify_counts
from vismt.data.decode import decode_file
from vismt.data.image_source import ImageSource, LoadedImages
from vismt.data.manifest import digest
from vismt.data.source_types import Card, Files, PackagedSource, file_groups, source_kind

HALVES = ("train", "test")
# Powers of the inverse root of x^4 = x + 1: an additive sequence that fills the (position, position, size) cube evenly.
STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)
SIDE_FROM, SIDE_SPAN = 0.45, 0.4


def crop_boxes(height: int, width: int, half: str, count: int) -> list[tuple[int, int, int]]:
    """Return `count` boxes (top, left, side) inside one half of a photograph; 'train' and 'test' share no pixel.

    The halves are left and right, or above and below in an upright photograph; an odd middle line is in neither. Sides
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


@source_kind("digits")
@dataclass(frozen=True, kw_only=True)
class DigitsSource(PackagedSource, ImageSource):
    """The 1,797 handwritten digits (8 x 8, 17 grey levels) that scikit-learn ships."""

    package: ClassVar[str | None] = "sklearn"

    def list_files(self, base: Path) -> Files:
        """Return scikit-learn's one data file."""
        name = "datasets/data/digits.csv.gz"
        return {"digits": file_groups(base, [name])[name]}

    def load(self, card: Card, base: Path, split: str) -> LoadedImages:
        """Return all 1,797 digits as uint8 (3, 8, 8); the 17 grey levels 0..16 become round(level * 255 / 16)."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        levels = torch.from_numpy(bunch.images).to(torch.float64)
        images = (levels * 255 / 16).round().to(torch.uint8)
        labels = [int(label) for label in bunch.target]
        verify_counts(card, self, base, {"all": len(labels)})
        classes = [str(name) for name in bunch.target_names]
        verify_classes(card, self, base, len(classes))
        return LoadedImages(
            classes=classes,
            labels=labels,
            ids=[f"all/{row:06d}" for row in range(len(labels))],
            read=lambda i: images[i].expand(3, -1, -1).contiguous(),
            content=lambda: hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        )


@source_kind("photo_crops")
@dataclass(frozen=True, kw_only=True)
class PhotoCropsSource(PackagedSource, ImageSource):
    """Square crops of the photographs that scikit-image ships.

    Attributes:
        photographs: maps class name to file name.
        crops_per_half: number of crops from either half of a photograph.
    """

    photographs: dict[str, RelativePath]
    crops_per_half: int
    package: ClassVar[str | None] = "skimage"

    def list_files(self, base: Path) -> Files:
        """Return the photographs, each as a group with the name of its class."""
        groups = file_groups(base / "data", self.photographs.values())
        return {name: groups[file] for name, file in self.photographs.items()}

    def load(self, card: Card, base: Path, split: str) -> LoadedImages:
        """Return the crops as uint8 (3, side, side), class = photograph; ids are `<split>/<photograph>/<crop>`.

        Only files inside the installed package are read; nothing is downloaded.

        Raises:
            UserError: the package does not have a photograph.
        """
        groups = self.list_files(base)
        absent = next((name for name, entries in groups.items() if not entries), None)
        if absent is not None:
            raise UserError(
                f"{card.shown}: the installed scikit-image has no '{self.photographs[absent]}'. {fix(card)}"
            )
        paths = {name: entries[0][1] for name, entries in groups.items()}

        @functools.cache
        def photograph(name: str) -> Tensor:
            return decode_file(paths[name])

        classes = list(paths)
        verify_classes(card, self, base, len(classes))
        halves = HALVES if split == "all" else (split,)
        entries = [
            (half, label, k) for half in halves for label in range(len(classes)) for k in range(self.crops_per_half)
        ]
        verify_counts(card, self, base, dict.fromkeys(halves, len(classes) * self.crops_per_half))

        def read(i: int) -> Tensor:
            half, label, k = entries[i]
            image = photograph(classes[label])
            top, left, side = crop_boxes(image.shape[1], image.shape[2], half, self.crops_per_half)[k]
            return image[:, top : top + side, left : left + side].contiguous()

        return LoadedImages(
            classes=classes,
            labels=[label for _, label, _ in entries],
            ids=[f"{half}/{classes[label]}/{k:03d}" for half, label, k in entries],
            read=read,
            content=lambda: f"{digest(paths.items()).sha256}:{self.crops_per_half}:{STEPS}:{split}",
        )
