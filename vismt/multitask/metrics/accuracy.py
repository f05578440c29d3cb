"""Accuracy: the share of images whose largest logit is that of their class, pooled over the data set."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from vismt.errors import UserError
from vismt.multitask.metrics.inputs import seen, sound


class Accuracy(MulticlassAccuracy):
    """Top-1 accuracy of `num_classes` classes over images ("micro", not a mean over classes).

    options: torchmetrics.Metric's.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        if num_classes < 2:
            raise UserError(f"Accuracy: num_classes = {num_classes}: at least 2.")
        super().__init__(num_classes, average="micro", validate_args=False, **options)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """One batch. pred: float logits (b, k). target: int64 (b,).

        Raises UserError for other shapes, NaN, and labels outside [0, k): leave images without a class out.
        """
        if pred.ndim != 2 or pred.shape[1] != self.num_classes or target.shape != pred.shape[:1]:
            raise UserError(
                f"Accuracy: predictions {tuple(pred.shape)}, targets {tuple(target.shape)}; needed (b, {self.num_classes}), (b,)."
            )
        strange = target[(target < 0) | (target >= self.num_classes)]
        if strange.numel():
            raise UserError(f"Accuracy: label {int(strange[0])} found, classes are 0 to {self.num_classes - 1}.")
        super().update(sound("Accuracy", pred, infinite=True), target.to(pred.device))

    def compute(self) -> dict[str, Any]:
        """Accuracy in [0, 1]; images: how many were counted. Raises UserError when no image was seen."""
        images = seen("Accuracy", self.tp + self.fn, "image with a class", "give it data")
        return {"accuracy": float(self.tp) / images, "images": images}
