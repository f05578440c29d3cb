"""What a task of a dense run is: a loss over valid pixels, a metric with the one number for Delta_m, and pictures of maps.

Targets of a batch, by `key`: labels int64 (b, h, w), 255 where there is none; depth float (b, h, w) in metres, 0 where there is
none; normals float (b, 3, h, w) of unit length, zeros where there is none; the class of an image int64 (b,), -1 where there is
none. A sample without labels for a task has none at all in its map (partial labels): it enters neither loss nor metric. Every
loss sees the valid pixels of the batch (of classification: its labelled images) as one list, so that nothing at other pixels,
NaN included, reaches it or its gradient; a mean is over valid pixels of the batch, not of images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vismt.errors import UserError
from vismt.multitask.heads import resize_logits

if TYPE_CHECKING:
    from torchmetrics import Metric

IGNORE = 255
DARK = 64  # grey of pixels without a value in pictures
# Of InvPT and TaskPrompter for NYUD-v2 and PASCAL-Context; a task's own default is its entry here.
NYUD_WEIGHTS = {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0}
PASCAL_WEIGHTS = {"semseg": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "edge": 50.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseTask(ABC):
    """Base of all, also of those that say one thing of an image. loss_weight: factor of the loss, > 0.

    name: of the task; key: of its target in a batch. channels: that a head must give. measure: the entry of the metric's
    `compute()` that is the task's score.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    vector: ClassVar[bool] = False  # the target has a dimension of 3 channels
    loss_weight: float = 1.0

    @property
    @abstractmethod
    def channels(self) -> int: ...

    @property
    @abstractmethod
    def measure(self) -> str: ...

    def __post_init__(self) -> None:
        between(self.name, "loss_weight", self.loss_weight, 0, float("inf"))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        """The loss without its weight, a scalar in at least fp32; None when no pixel of the batch is valid.

        prediction: float (b, channels, h, w), at the target's size; (b, channels) of whole images. Under several processes it
        is this process's own mean. Raises UserError for other shapes, sizes and dtypes and labels that are no class.
        """
        self.check(prediction, target)
        valid = self.valid(target)
        rows = prediction.movedim(1, -1)[valid]
        truth = (target.movedim(1, -1) if self.vector else target)[valid]
        if not len(rows):
            return None
        return self.pixel_loss(rows.to(torch.promote_types(rows.dtype, torch.float32)), truth)

    def update(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        """Count a batch; samples without a valid pixel are left out. Arguments and errors as `loss`, and the metric's own."""
        self.check(prediction, target)
        labelled = self.valid(target)[:, None].flatten(1).any(1)
        if labelled.any():
            self.count(metric, prediction.detach()[labelled], target[labelled])

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        """A prediction (b, channels, ...) as it may be averaged with other views of the image.

        mirrored: it was made of the mirrored image; what is given is of the image as it stands.
        """
        return prediction

    def score(self, computed: dict[str, Any]) -> float:
        """The one number for Delta_m out of the metric's `compute()`."""
        return float(computed[self.measure])

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The logits of a head at the size (h, w) of the targets; as they are where they speak of whole images."""
        return logits

    @abstractmethod
    def answer(self, prediction: Tensor) -> Tensor:
        """What one prediction (channels, h, w) says: class ids int64 (h, w), a probability or depth (h, w), unit vectors.

        Of a whole image's (channels,), the class id int64 ().
        """

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric of vismt.multitask.metrics."""

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """Bool (b, h, w), (b,) of whole images: where the target has a value."""

    @abstractmethod
    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of p > 0 valid pixels. prediction: at least fp32 (p, channels). target: (p,) or (p, 3)."""

    def count(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        """Hand samples with a valid pixel to the metric."""
        metric.update(prediction, target)

    @abstractmethod
    def check(self, prediction: Tensor, target: Tensor) -> None:
        """UserError unless the two are of the same places, of this task's shape and kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MapTask(DenseTask):
    """Tasks with a value at every pixel, of which pictures can be drawn."""

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return resize_logits(logits, size)

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        return prediction.flip(-1) if mirrored else prediction

    def picture(self, map: Tensor, like: Tensor | None = None) -> Tensor:
        """uint8 (3, h, w) on the CPU of one prediction (channels, h, w) or target, as in a batch; no value: dark grey.

        like: a map whose range of values sets the colours (depth), so that a prediction is drawn as its target is.
        Raises UserError for another shape.
        """
        predicted = map.ndim == 3 and len(map) == self.channels and map.is_floating_point()
        if not predicted and map.ndim != 2 + self.vector:
            raise UserError(f"{self.name}: no picture of a map {tuple(map.shape)} {map.dtype}; give one sample's map.")
        colors, shown = self.paint(map.detach().cpu(), predicted, None if like is None else like.detach().cpu())
        return torch.where(shown, (255 * colors).round(), DARK).to(torch.uint8)

    @abstractmethod
    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Colours, float (3, h, w) in [0, 1], and where there is a value, bool (h, w)."""

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.ndim != 4 or prediction.shape[1] != self.channels or not prediction.is_floating_point():
            raise UserError(
                f"{self.name}: the prediction is {tuple(prediction.shape)} {prediction.dtype}, needed floating point "
                f"(b, {self.channels}, h, w)."
            )
        shape = "(b, 3, h, w)" if self.vector else "(b, h, w)"
        if target.ndim != 3 + self.vector or (self.vector and target.shape[1] != 3):
            raise UserError(f"{self.name}: the target is {tuple(target.shape)}, needed {shape}.")
        if len(prediction) != len(target) or prediction.shape[-2:] != target.shape[-2:]:
            raise UserError(
                f"{self.name}: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}: resize the prediction to the "
                "target's size (resize_logits), never the target."
            )


class LabelTask(MapTask):
    """Tasks whose target is a map of labels, 0 to classes - 1 or 255."""

    classes: int

    def valid(self, target: Tensor) -> Tensor:
        return target != IGNORE

    def check(self, prediction: Tensor, target: Tensor) -> None:
        super().check(prediction, target)
        self.check_labels(target)

    def check_labels(self, target: Tensor) -> None:
        """UserError unless `target` holds classes and 255 alone."""
        check_labels(self.name, target, self.classes, IGNORE)


def check_labels(task: str, target: Tensor, classes: int, none: int) -> None:
    """UserError unless the int64 `target` holds 0 to classes - 1 and `none` alone."""
    if target.dtype != torch.int64:
        raise UserError(f"{task}: the target is {target.dtype}, needed int64 labels.")
    strange = target[(target != none) & ((target < 0) | (target >= classes))]
    if strange.numel():
        raise UserError(f"{task}: label {int(strange[0])} found, classes are 0 to {classes - 1}, {none} is none.")


def between(task: str, option: str, value: Any, low: float, high: float) -> None:
    """UserError unless low < value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise UserError(f"{task}: {option} {value!r}; it must be a number above {low:g} and below {high:g}.")
