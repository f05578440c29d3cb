"""Semantic segmentation: L = mean over valid pixels of -log softmax(z)_y.

The same in all multi-task work (ASTMT, arXiv 1904.08918; InvPT, arXiv 2203.07997; LibMTL, arXiv 2203.14338), which differs in
what a class counts that is nowhere in the test set: see `absent` and vismt/multitask/metrics/segmentation.py. LibMTL marks
pixels without a class by -1, which a reader must turn into 255.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.errors import UserError, near
from vismt.multitask.tasks.base import IGNORE, PASCAL_WEIGHTS, LabelTask

if TYPE_CHECKING:
    from torchmetrics import Metric

ABSENT = ("zero", "skip", "nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation(LabelTask):
    """semseg. classes: their number, background included where it is one. absent: "zero", "skip" or "nan", see the metric.

    colors: (r, g, b) in 0..255 of each class; None for hues that differ.
    """

    name, key, measure = "semseg", "semseg", "miou"
    classes: int
    absent: str = "zero"
    colors: Sequence[Sequence[int]] | None = None
    loss_weight: float = PASCAL_WEIGHTS["semseg"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or not 2 <= self.classes <= IGNORE:
            raise UserError(f"{self.name}: classes {self.classes!r}; it must be a whole number from 2 to {IGNORE}.")
        if self.absent not in ABSENT:
            raise UserError(f"{self.name}: absent '{self.absent}'.{near(str(self.absent), ABSENT)}")
        if self.colors is not None:
            sound = all(isinstance(color, Sequence) and len(color) == 3 for color in self.colors)
            sound = sound and all(
                isinstance(level, int) and 0 <= level <= 255 for color in self.colors for level in color
            )
            if not sound or len(self.colors) != self.classes:
                raise UserError(f"{self.name}: colors must be (r, g, b) in 0..255 for each of {self.classes} classes.")

    @property
    def channels(self) -> int:
        return self.classes

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(0)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import MeanIoU

        return MeanIoU(self.classes, ignore_index=IGNORE, absent=self.absent)

    def palette(self) -> Sequence[Sequence[int]]:
        """(r, g, b) in 0..255 of each class."""
        return class_colors(self.classes) if self.colors is None else self.colors

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        if not predicted:
            self.check_labels(map)
        labels = self.answer(map) if predicted else map
        shown = self.valid(labels)
        return (torch.tensor(self.palette()) / 255)[labels.where(shown, 0)].movedim(-1, 0), shown


def class_colors(classes: int) -> list[tuple[int, int, int]]:
    """(r, g, b) in 0..255 for each class, all different, none grey. Neighbours are far apart on the circle of hues."""
    tones = ((0.80, 0.95), (0.60, 0.70), (0.45, 1.00), (0.95, 0.60))
    found = []
    for label in range(classes):
        saturation, value = tones[label % len(tones)]
        # Steps of the golden ratio never come back to a hue they have been at.
        red, green, blue = colorsys.hsv_to_rgb(0.6 + label * 0.618034 % 1, saturation, value)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found
