"""Classification of the whole image next to dense tasks: L = mean over labelled images of -sum_c q_c log softmax(z)_c.

q_c = (1 - s) [c = y] + s / K with the label smoothing s (Szegedy et al., arXiv 1512.00567); s = 0 is the plain cross-entropy.
The logits (b, K) are computed from the mean of the image's patch tokens (PooledHead); they are neither resized nor drawn.
Images without a class (-1) enter neither the loss nor the score, which is the share of labelled images that are classified
correctly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import CLASS, NO_CLASS
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.tasks.base import DenseTask, check_count, check_labels

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(DenseTask, ClassLoss):
    """The task "classify"; also takes the options of `ClassLoss`, for long-tailed classes.

    Args:
        classes: number of classes K, 2 or more.
        label_smoothing: s, 0 <= s < 1.
        loss_weight: factor of the loss, > 0.
    """

    name, key = "classify", CLASS
    measure, label, share = "accuracy", "accuracy", True
    predicts_classes = True
    classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "classes", self.classes, 2)
        self.check_options(self.name, self.classes)
        smoothing = self.label_smoothing
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise UserError(f"{self.name}: label_smoothing {smoothing!r}; it must be a number from 0 and below 1.")

    @property
    def channels(self) -> int:
        return self.classes

    def valid(self, target: Tensor) -> Tensor:
        return target != NO_CLASS

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.entropies(prediction, target, self.label_smoothing).mean()

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(0)

    def caption(self, prediction: Tensor, class_names: Sequence[str] = ()) -> str:
        """Return the likeliest class and its probability in per cent."""
        probability, label = prediction.softmax(0).max(0)
        name = class_names[int(label)] if class_names else f"class {int(label)}"
        return f"{name} {100 * float(probability):.0f} %"

    def metric(self) -> Metric:
        from vismt.multitask.metrics import Accuracy

        return Accuracy(self.classes)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.ndim != 2 or prediction.shape[1] != self.classes or not prediction.is_floating_point():
            raise UserError(
                f"{self.name}: the prediction is {tuple(prediction.shape)} {prediction.dtype}, needed floating point "
                f"(b, {self.classes}), one row for each image."
            )
        if target.shape != prediction.shape[:1]:
            needed = f"({len(prediction)},), a class for each image"
            raise UserError(f"{self.name}: the target is {tuple(target.shape)}, needed {needed}.")
        check_labels(self.name, target, self.classes, NO_CLASS)
