"""Classification of the whole image beside dense tasks: L = mean over labelled images of -sum_c q_c log softmax(z)_c.

q_c = (1 - s) [c = y] + s / K, with s the label smoothing (Szegedy et al., arXiv 1512.00567), 0 for the plain cross-entropy of y.
The logits are of the image, (b, K), from the mean of its patch tokens (PooledHead), and nothing is resized or drawn.
Images without a class are blank (-1) and enter neither loss nor score, which is the share of labelled images that are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vismt.data.dense_sample import CLASS, NO_CLASS
from vismt.errors import UserError
from vismt.multitask.tasks.base import DenseTask, check_labels

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(DenseTask):
    """classify. classes: their number K, 2 or more. label_smoothing: s, 0 <= s < 1."""

    name, key, measure = "classify", CLASS, "accuracy"
    classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise UserError(f"{self.name}: classes {self.classes!r}; it must be a whole number, at least 2.")
        smoothing = self.label_smoothing
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise UserError(f"{self.name}: label_smoothing {smoothing!r}; it must be a number from 0 and below 1.")

    @property
    def channels(self) -> int:
        return self.classes

    def valid(self, target: Tensor) -> Tensor:
        return target != NO_CLASS

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, label_smoothing=self.label_smoothing)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(0)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import Accuracy

        return Accuracy(self.classes)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        """UserError unless the two are of the same images, of this task's shape and kind."""
        if prediction.ndim != 2 or prediction.shape[1] != self.classes or not prediction.is_floating_point():
            raise UserError(
                f"{self.name}: the prediction is {tuple(prediction.shape)} {prediction.dtype}, needed floating point "
                f"(b, {self.classes}), one row for each image."
            )
        if target.shape != prediction.shape[:1]:
            wanted = f"({len(prediction)},), a class for each image"
            raise UserError(f"{self.name}: the target is {tuple(target.shape)}, needed {wanted}.")
        check_labels(self.name, target, self.classes, NO_CLASS)
