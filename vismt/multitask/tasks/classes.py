"""Tasks whose answer is a class: semantic segmentation, human parts, and classification of the whole image.

Segmentation: L = mean over valid pixels of -log softmax(z)_y, on request balanced over the classes, plus Dice. The plain loss
is the same in all multi-task work (ASTMT, arXiv 1904.08918, InvPT, arXiv 2203.07997, LibMTL, arXiv 2203.14338). The papers
differ in how a class counts that does not occur in the test set, see `absent` and vismt/multitask/metrics/classes.py. LibMTL
marks pixels without a class by -1, which a reader must turn into 255. vismt/multitask/class_loss.py has the options for classes
of unequal frequency. The papers have no such options, although mIoU weighs all classes alike and the plain loss weighs all
pixels alike.

Human parts: segmentation into background and 6 parts of PASCAL-Context people, with weight 2 (ASTMT, InvPT). As in ASTMT's
loader, the target is 0, background, on everything but annotated parts, also on people whose parts nobody annotated. Images
without annotated parts have no target.

Classification next to dense tasks: L = mean over labelled images of -sum_c q_c log softmax(z)_c with the label smoothing s, q_c
= (1 - s) [c = y] + s / K (Szegedy et al., arXiv 1512.00567). s = 0 is the plain cross-entropy. The logits (b, K) are computed
from the mean of the image's patch tokens (PooledHead). They are neither resized nor drawn. Images without a class (-1) enter
neither the loss nor the score, which is the share of labelled images that are classified correctly.

Several such tasks t with K_t classes may have one label space, as in EMTAL (vismt/multitask/nets.py): z is the logits of all of
them side by side, (b, C) with C = sum K_t, and label y of task t stands for class K_1 + .. + K_{t-1} + y. An answer that is a
class of another task is wrong.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vismt.base.errors import UserError, need_whole, require_known, shown_value
from vismt.data.formats.pascal_context import PARTS
from vismt.data.maps.dense_sample import NO_CLASS, class_key
from vismt.multitask.class_loss import ClassLoss, check_loss_factor, dice_loss
from vismt.multitask.tasks.base import (
    IGNORE,
    PASCAL_WEIGHTS,
    TASKS,
    LabelTask,
    Number,
    Task,
    check_labels,
    log_frequencies,
)
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    from torchmetrics import Metric

_ABSENT = ("zero", "skip", "nan")
CLASS_NUMBERS = {
    "miou": Number("mIoU", share=True),
    "pixel_accuracy": Number("pixel accuracy", share=True),
    "mean_accuracy": Number("mean accuracy of the classes", share=True),
}


@TASKS.register("semseg")
@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation(LabelTask, ClassLoss):
    """The task "semseg". It also takes the options of `ClassLoss`.

    Args:
        classes: Number of classes. A background class counts too.
        absent: How the score counts a class that does not occur: "zero", "skip" or "nan", see the metric.
        class_names: Name of each class. None for the names on the card of the data.
        colors: Colour (r, g, b) in 0..255 of each class. None for distinct hues.
        dice: Factor of the Dice loss, which is added, >= 0.
        loss_weight: Factor of the loss, > 0.
    """

    name, key = "semseg", "semseg"
    measure = "miou"
    predicts_classes = True
    classes: int
    absent: str = "zero"
    class_names: Sequence[str] | None = None
    colors: Sequence[Sequence[int]] | None = None
    dice: float = 0.0
    loss_weight: float = PASCAL_WEIGHTS["semseg"]

    def __post_init__(self) -> None:
        super().__post_init__()
        need_whole(f"{self.name}: classes", self.classes, 2, IGNORE)
        require_known(f"{self.name}: absent", [self.absent], _ABSENT)
        self.check_options(self.name, self.classes)
        check_loss_factor(self.name, "dice", self.dice)
        names = self.class_names
        if names is not None and (isinstance(names, str) or len(names) != self.classes):
            raise UserError(f"{self.name}: class_names {shown_value(names)}; give {self.classes} names.")
        if self.colors is not None and not (all(map(_is_color, self.colors)) and len(self.colors) == self.classes):
            raise UserError(f"{self.name}: colors must be (r, g, b) in 0..255 for each of {self.classes} classes.")

    @property
    def channels(self) -> int:
        return self.classes

    @property
    def numbers(self) -> Mapping[str, Number]:
        names = enumerate(self.shown_names)
        of_classes = {f"iou {label}": Number(f"IoU of {name}", share=True) for label, name in names}
        return {**CLASS_NUMBERS, **of_classes}

    def values(self, computed: JsonObject) -> dict[str, float]:
        of_classes = {f"iou {label}": iou for label, iou in enumerate(computed["iou"])}
        return super().values({**computed, **of_classes})

    @property
    def shown_names(self) -> list[str]:
        """Name of each class, "class 4" without names."""
        names = self.class_names or self.default_class_names
        return list(map(str, names)) or [f"class {label}" for label in range(self.classes)]

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

    def legend(self, map: Tensor, class_names: Sequence[str] = ()) -> list[tuple[str, str]]:
        labels = self.answer(map) if map.is_floating_point() else map[self.valid(map)]
        counts = torch.bincount(labels.flatten(), minlength=self.classes)
        order = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label] > 0]
        colors = ["#" + "".join(f"{level:02x}" for level in color) for color in self.palette()]
        names = class_names or self.shown_names
        return [(names[label], colors[label]) for label in order]

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw each class in its colour of `palette`."""
        if not predicted:
            self.check_labels(map)
        labels = self.answer(map) if predicted else map
        visible = self.valid(labels)
        return (torch.tensor(self.palette()) / 255)[labels.where(visible, 0)].movedim(-1, 0), visible


@TASKS.register("parts")
@dataclass(frozen=True, kw_only=True, eq=False)
class HumanParts(Segmentation):
    """The task "parts". It has the options of `Segmentation`, with 7 classes as the default."""

    name, key = "parts", "parts"
    classes: int = len(PARTS)
    loss_weight: float = PASCAL_WEIGHTS["parts"]

    @property
    def default_class_names(self) -> Sequence[str]:
        return PARTS if self.classes == len(PARTS) else ()


@TASKS.register("classify")
@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(Task, ClassLoss):
    """The task "classify". It also takes the options of `ClassLoss`, for long-tailed classes.

    Args:
        name: Name of the task, if a run has several tasks of whole images.
        classes: Number K of classes, 2 or more.
        label_smoothing: Share s of the label that is spread over all classes, 0 <= s < 1.
        loss_weight: Factor of the loss, > 0.
    """

    measure = "accuracy"
    numbers = {"accuracy": Number("accuracy", share=True)}  # noqa: RUF012  # a constant
    predicts_classes = True
    name: str = "classify"
    classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        need_whole(f"{self.name}: classes", self.classes, 2)
        self.check_options(self.name, self.classes)
        smoothing = self.label_smoothing
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise UserError(
                f"{self.name}: label_smoothing {shown_value(smoothing)}; it must be a number from 0 and below 1."
            )

    @property
    def channels(self) -> int:
        return self.classes

    @property
    def key(self) -> str:
        return class_key(self.name)

    @property
    def outputs(self) -> int:
        """Number of classes among which the answer is."""
        return self.classes

    def placed(self, target: Tensor) -> Tensor:
        """Return the places of labels among the outputs."""
        return target

    def valid(self, target: Tensor) -> Tensor:
        return target != NO_CLASS

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.entropies(prediction, self.placed(target), self.label_smoothing).mean()

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(0)

    def caption(self, prediction: Tensor, class_names: Sequence[str] = ()) -> str:
        """Return the likeliest class and its probability in per cent."""
        probability, label = prediction.softmax(0).max(0)
        name = class_names[int(label)] if class_names else f"class {int(label)}"
        return f"{name} {100 * float(probability):.0f} %"

    def metric(self) -> Metric:
        from vismt.multitask.metrics import Accuracy

        return Accuracy(self.outputs)

    def count(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        metric.update(prediction, self.placed(target))

    def constant(self, values: Tensor) -> Tensor:
        return log_frequencies(self.placed(values), self.outputs)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.ndim != 2 or prediction.shape[1] != self.outputs or not prediction.is_floating_point():
            raise UserError(
                f"{self.name}: the prediction is {tuple(prediction.shape)} {prediction.dtype}, needed floating point "
                f"(b, {self.outputs}), one row for each image."
            )
        if target.shape != prediction.shape[:1]:
            needed = f"({len(prediction)},), a class for each image"
            raise UserError(f"{self.name}: the target is {tuple(target.shape)}, needed {needed}.")
        check_labels(self.name, target, self.classes, NO_CLASS)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnionClassification(Classification):
    """A task of whole images whose answer is among the classes of several such tasks, with one softmax over all of them.

    Its head has the rows of its own classes, and its logits (b, C) are the logits of all tasks side by side (`DenseNet`).

    Args:
        offset: Place of the task's first class.
        total: Number C of classes of all tasks.
    """

    offset: int
    total: int

    @property
    def outputs(self) -> int:
        return self.total

    def placed(self, target: Tensor) -> Tensor:
        return target + self.offset


def unite(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks in the same order, two or more tasks of whole images over the union of their classes."""
    whole = [task for task in tasks if isinstance(task, Classification)]
    if len(whole) < 2:
        return list(tasks)
    total, offset = sum(task.classes for task in whole), 0
    united: list[Task] = []
    for task in tasks:
        if isinstance(task, Classification):
            options = {field.name: getattr(task, field.name) for field in fields(Classification)}
            task, offset = UnionClassification(**options, offset=offset, total=total), offset + task.classes
        united.append(task)
    return united


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
    if not isinstance(color, Sequence) or len(color) != 3:
        return False
    return all(isinstance(level, int) and 0 <= level <= 255 for level in color)
