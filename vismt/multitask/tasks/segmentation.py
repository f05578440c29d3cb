"""Semantic segmentation: L = mean over valid pixels of -log softmax(z)_y, on request balanced over the classes, plus Dice.

The plain loss is the same in all multi-task work (ASTMT, arXiv 1904.08918; InvPT, arXiv 2203.07997; LibMTL, arXiv
2203.14338), which differs in how a class counts that does not occur in the test set: see `absent` and
vismt/multitask/metrics/segmentation.py. LibMTL marks pixels without a class by -1, which a reader must turn into 255. The
options for classes of unequal frequency are those of vismt/multitask/class_loss.py, which that work leaves out although mIoU
weighs all classes alike and the plain loss all pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.class_loss import ClassLoss, check_factor, dice_loss
from vismt.multitask.tasks.base import IGNORE, PASCAL_WEIGHTS, LabelTask, check_choice

if TYPE_CHECKING:
    from torchmetrics import Metric

ABSENT = ("zero", "skip", "nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation(LabelTask, ClassLoss):
    """The task "semseg"; also takes the options of `ClassLoss`.

    Args:
        classes: number of classes, background included where it is a class.
        absent: how the score counts a class that does not occur, "zero", "skip" or "nan", see the metric.
        colors: (r, g, b) in 0..255 of each class; None for distinct hues.
        dice: factor of the Dice loss, which is added, >= 0.
        loss_weight: factor of the loss, > 0.
    """

    name, key = "semseg", "semseg"
    measure, label, share = "miou", "mIoU", True
    predicts_classes = True
    classes: int
    absent: str = "zero"
    colors: Sequence[Sequence[int]] | None = None
    dice: float = 0.0
    loss_weight: float = PASCAL_WEIGHTS["semseg"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or not 2 <= self.classes <= IGNORE:
            raise UserError(f"{self.name}: classes {self.classes!r}; it must be a whole number from 2 to {IGNORE}.")
        check_choice(self.name, "absent", self.absent, ABSENT)
        self.check_options(self.name, self.classes)
        check_factor(self.name, "dice", self.dice)
        if self.colors is not None and not (all(map(_is_color, self.colors)) and len(self.colors) == self.classes):
            raise UserError(f"{self.name}: colors must be (r, g, b) in 0..255 for each of {self.classes} classes.")

    @property
    def channels(self) -> int:
        return self.classes

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = self.entropies(prediction, target).mean()
        return loss + self.dice * dice_loss(prediction, target) if self.dice else loss

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(0)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import MeanIoU

        return MeanIoU(self.classes, ignore_index=IGNORE, absent=self.absent)

    def palette(self) -> Sequence[Sequence[int]]:
        """Return (r, g, b) in 0..255 of each class."""
        return class_colors(self.classes) if self.colors is None else self.colors

    def legend(self, prediction: Tensor, class_names: Sequence[str] = ()) -> list[tuple[str, str]]:
        counts = torch.bincount(self.answer(prediction).flatten(), minlength=self.classes)
        order = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label] > 0]
        colors = ["#" + "".join(f"{level:02x}" for level in color) for color in self.palette()]
        return [(class_names[label] if class_names else f"class {label}", colors[label]) for label in order]

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw each class in its colour of `palette`."""
        if not predicted:
            self.check_labels(map)
        labels = self.answer(map) if predicted else map
        visible = self.valid(labels)
        return (torch.tensor(self.palette()) / 255)[labels.where(visible, 0)].movedim(-1, 0), visible


def class_colors(classes: int) -> list[tuple[int, int, int]]:
    """Return (r, g, b) in 0..255 for each class: all different, not grey, with distant hues for neighbouring classes."""
    tones = ((0.80, 0.95), (0.60, 0.70), (0.45, 1.00), (0.95, 0.60))
    colors = []
    for label in range(classes):
        saturation, value = tones[label % len(tones)]
        # Multiples of the golden ratio modulo 1 never repeat a hue.
        red, green, blue = colorsys.hsv_to_rgb(0.6 + label * 0.618034 % 1, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def _is_color(color: object) -> bool:
    """Return whether `color` is (r, g, b) with levels in 0..255."""
    if not isinstance(color, Sequence) or len(color) != 3:
        return False
    return all(isinstance(level, int) and 0 <= level <= 255 for level in color)
