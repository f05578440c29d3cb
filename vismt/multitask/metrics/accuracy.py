"""Accuracy: the share of images whose largest logit is that of their class, pooled over the data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vismt.base.errors import UserError
from vismt.multitask.metrics.inputs import require_any, require_numbers


class Accuracy(Metric):
    """Top-1 accuracy over images, not a mean over classes.

    Args:
        num_classes: number of classes k, 2 or more.
        options: options of torchmetrics.Metric.
    """

    full_state_update, higher_is_better, is_differentiable = False, True, False
    correct: Tensor
    images: Tensor

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        if num_classes < 2:
            raise UserError(f"Accuracy: num_classes = {num_classes}; it must be at least 2.")
        self.num_classes = num_classes
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            pred: float logits (b, k).
            target: int64 (b,), in [0, k); leave out images without a class.

        Raises:
            UserError: for other shapes, NaN, and labels out of range.
        """
        if pred.ndim != 2 or pred.shape[1] != self.num_classes or target.shape != pred.shape[:1]:
            raise UserError(
                f"Accuracy: predictions {tuple(pred.shape)}, targets {tuple(target.shape)}; needed (b, {self.num_classes}), (b,)."
            )
        strange = target[(target < 0) | (target >= self.num_classes)]
        if strange.numel():
            raise UserError(f"Accuracy: label {int(strange[0])}; classes are 0 to {self.num_classes - 1}.")
        classes = require_numbers("Accuracy", pred, infinite=True).argmax(1)
        self.correct += (classes == target.to(pred.device)).sum().to(self.correct.device)
        self.images += len(target)

    def compute(self) -> dict[str, Any]:
        """Return "accuracy" in [0, 1] and the number of "images".

        Raises:
            UserError: without an image.
        """
        images = require_any("Accuracy", self.images, "image with a class", "give it data")
        return {"accuracy": int(self.correct) / images, "images": images}
