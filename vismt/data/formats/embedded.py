"""Sets inside installed packages: scikit-learn's digits, crops of scikit-image's photographs, Python's own help texts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.typed import RelativePath, within
from vismt.data.copies import digest_files, fix
from vismt.data.decode import decode_file
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import Card, Files, PackagedSource, file_groups, source_kind
from vismt.data.texts.text_set import TextRows, TextSource

_DIGITS = "datasets/data/digits.csv.gz"  # file in scikit-learn
HALVES = ("train", "test")
# Powers of the inverse root of x^4 = x + 1. They give an additive sequence that fills the (position, position, size) cube
# evenly.
_STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)
SIDE_FROM, SIDE_SPAN = 0.45, 0.4


def crop_boxes(height: int, width: int, half: str, count: int) -> list[tuple[int, int, int]]:
    """Return `count` boxes (top, left, side) inside one half of a photograph. "train" and "test" share no pixel.

    The halves are left and right, or above and below in an upright photograph. An odd middle line is in neither. Sides are 0.45
    to 0.85 of the half's shorter side. The boxes are a fixed additive sequence without random numbers.
    """
    upright = height > width
    rows, columns = (height // 2, width) if upright else (height, width // 2)
    first = half == HALVES[0]
    top0 = height - rows if upright and not first else 0
    left0 = width - columns if not upright and not first else 0
    boxes = []
    for i in range(count):
        step = i + 1 + (0 if first else count)
        u, v, s = ((0.5 + step * alpha) % 1.0 for alpha in _STEPS)
        side = max(1, round(min(rows, columns) * (SIDE_FROM + SIDE_SPAN * s)))
        boxes.append((top0 + int(u * (rows - side + 1)), left0 + int(v * (columns - side + 1)), side))
    return boxes


@source_kind("digits")
@dataclass(frozen=True, kw_only=True)
class DigitsSource(PackagedSource, ImageSource):
    """The 1,797 handwritten digits (8 x 8, 17 grey levels) that scikit-learn ships."""

    package: ClassVar[str | None] = "sklearn"
    fixed_splits: ClassVar[tuple[str, ...]] = ("all",)

    def list_files(self, base: Path) -> Files:
        return {"digits": file_groups(base, [_DIGITS])[_DIGITS]}

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return all 1,797 digits as uint8 (3, 8, 8). The 17 grey levels 0..16 become round(level * 255 / 16)."""
        # 64 grey levels and the digit. Importing sklearn would take a second.
        table = np.loadtxt(base / _DIGITS, delimiter=",")
        images = (torch.from_numpy(table[:, :-1]).reshape(-1, 8, 8) * 255 / 16).round().to(torch.uint8)
        digits = table[:, -1].astype(int).tolist()
        return Listing(
            classes=[str(digit) for digit in range(10)],
            rows={"all": [ImageRow(f"all/{row:06d}", digit, row) for row, digit in enumerate(digits)]},
            read=lambda row: images[row].expand(3, -1, -1).contiguous(),
            content=lambda: hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        )


@source_kind("photo_crops")
@dataclass(frozen=True, kw_only=True)
class PhotoCropsSource(PackagedSource, ImageSource):
    """Square crops of the photographs that scikit-image ships.

    Attributes:
        photographs: File name by class name.
        crops_per_half: Number of crops from either half of a photograph.
    """

    photographs: dict[str, RelativePath]
    crops_per_half: Annotated[int, within(1)]
    package: ClassVar[str | None] = "skimage"
    fixed_splits: ClassVar[tuple[str, ...]] = HALVES

    def list_files(self, base: Path) -> Files:
        """Return the photographs, each as a group with the name of its class."""
        groups = file_groups(base / "data", self.photographs.values())
        return {name: groups[file] for name, file in self.photographs.items()}

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the crops as uint8 (3, side, side) with class = photograph. Ids are `<split>/<photograph>/<crop>`."""
        groups = self.list_files(base)
        absent = next((name for name, entries in groups.items() if not entries), None)
        if absent is not None:
            raise UserError(
                f"{card.shown}: the installed scikit-image has no '{self.photographs[absent]}'. {fix(card)}"
            )
        paths = {name: entries[0][1] for name, entries in groups.items()}
        photograph = functools.cache(decode_file)

        def read(place: tuple[Path, str, int]) -> Tensor:
            path, half, k = place
            image = photograph(path)
            top, left, side = crop_boxes(image.shape[1], image.shape[2], half, self.crops_per_half)[k]
            return image[:, top : top + side, left : left + side].contiguous()

        def crops(half: str) -> list[ImageRow]:
            return [
                ImageRow(f"{half}/{name}/{k:03d}", label, (path, half, k))
                for label, (name, path) in enumerate(paths.items())
                for k in range(self.crops_per_half)
            ]

        asked = "all" if len(splits) > 1 else splits[0]
        return Listing(
            classes=list(paths),
            rows={half: crops(half) for half in splits},
            read=read,
            content=lambda: f"{digest_files(paths.items()).sha256}:{self.crops_per_half}:{_STEPS}:{asked}",
        )


@source_kind("python_topics")
@dataclass(frozen=True, kw_only=True)
class PythonTopicsSource(PackagedSource, TextSource):
    """The topics of Python's language reference that `help()` shows: rows with the fields `topic` and `text`.

    Every fourth topic in alphabetical order is a test text.
    """

    package: ClassVar[str | None] = "pydoc_data"
    fixed_splits: ClassVar[tuple[str, ...]] = HALVES

    def list_files(self, base: Path) -> Files:
        return file_groups(base, ["topics.py"])

    def read_rows(self, card: Card, base: Path, splits: Sequence[str]) -> TextRows:
        from pydoc_data.topics import topics

        parts: dict[str, dict[str, dict[str, str]]] = {"train": {}, "test": {}}
        for number, (topic, text) in enumerate(sorted(topics.items()), 1):
            parts["train" if number % 4 else "test"][topic] = {"topic": topic, "text": text.strip()}
        asked = "all" if len(splits) > 1 else splits[0]
        hashed = [("topics.py", base / "topics.py")]
        return TextRows({split: parts[split] for split in splits}, lambda: f"{digest_files(hashed).sha256}:{asked}")
