"""Metrics of classes: mean intersection over union of pixels, and the accuracy over images.

The intersection over union comes from one confusion matrix of the whole data set:

    IoU_c = TP_c / (TP_c + FP_c + FN_c),   mIoU = mean_c IoU_c,   pixel accuracy = sum_c TP_c / pixels
    mean accuracy = mean over labelled classes of TP_c / (TP_c + FN_c)

Pixels with the ignore label are not counted. A class that occurs neither as a label nor as a prediction has IoU 0 / 0. The
literature treats it in three ways: as 0, which enters the mean (Vandenhende et al., arXiv 2004.13379, InvPT, TaskPrompter), as
NaN, which makes the mean NaN (LibMTL, arXiv 2203.14338), or left out of the mean. A class that is predicted but not labelled
has IoU 0 in all conventions. The accuracy is the share of images whose largest logit belongs to their class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vismt.base.errors import UserError, require_known
from vismt.multitask.metrics.inputs import Sums, check_same_size, map_of, require_any, require_numbers
from vismt.storage.files import JsonObject

_ABSENT = ("zero", "skip", "nan")


class MeanIoU(Sums):
    """Mean IoU over all classes. A background class counts too.

    Args:
        num_classes: Number k of classes, 2 or more.
        ignore_index: Label of ignored pixels. None for no such label.
        absent: How a class that does not occur counts: "zero" (Vandenhende, InvPT, TaskPrompter), "nan" (LibMTL) or "skip".
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = True
    confusion: Tensor

    def __init__(
        self, num_classes: int, *, ignore_index: int | None = 255, absent: str = "zero", **options: object
    ) -> None:
        super().__init__(**options)
        if num_classes < 2:
            raise UserError(f"MeanIoU: num_classes = {num_classes}; it must be at least 2, with background as a class.")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        require_known("MeanIoU: absent", [absent], _ABSENT)
        self.absent = absent
        self.add_sums(confusion=(num_classes, num_classes))

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. Images in which all pixels are ignored do not count.

        Args:
            pred: Logits float (b, k, h, w), or classes int (b, h, w) or (b, 1, h, w).
            target: Classes int (b, h, w) or (b, 1, h, w).

        Raises:
            UserError: If sizes differ, targets are not integers, predictions are NaN, or a label or predicted class at a pixel
                that counts is outside of [0, k).
        """
        if target.is_floating_point():
            raise UserError(
                f"MeanIoU: the target must hold integer labels, is {target.dtype}; convert it with .long()."
            )
        target = map_of("MeanIoU", "target", target).long()
        classes = self._classes(pred)
        check_same_size("MeanIoU", classes, target, "label map")
        target = target.to(classes.device)
        valid = torch.ones_like(target, dtype=torch.bool) if self.ignore_index is None else target != self.ignore_index
        classes, target = classes[valid], target[valid]
        self._in_range("label", target, f"ignore_index is {self.ignore_index}")
        self._in_range("predicted class", classes, "predict one of the classes everywhere")
        confusion = multiclass_confusion_matrix(classes, target, self.num_classes, validate_args=False)
        self.confusion += confusion.to(self.confusion.device)

    def compute(self) -> JsonObject:
        """Return the scores.

        Returns:
            Numbers by name: "miou", "pixel_accuracy" and "mean_accuracy" in [0, 1], "iou" (a list of k floats, NaN for a class
            that does not occur), "confusion" (k rows of k numbers of pixels, by the true class and then by the predicted
            class), and the number of "pixels".

        Raises:
            UserError: If no pixel is labelled.
        """
        fix = f"give it data, check ignore_index={self.ignore_index}"
        pixels = require_any("MeanIoU", self.confusion.sum(), "labelled pixel", fix)
        confusion = self.confusion.cpu().double()
        true = confusion.diag()
        iou = true / (confusion.sum(0) + confusion.sum(1) - true)
        counted = iou.nan_to_num(0.0) if self.absent == "zero" else iou
        mean = counted.nanmean() if self.absent == "skip" else counted.mean()
        return {
            "miou": float(mean),
            "iou": iou.tolist(),
            "pixel_accuracy": float(true.sum() / pixels),
            "mean_accuracy": float((true / confusion.sum(1)).nanmean()),
            "confusion": self.confusion.tolist(),
            "pixels": pixels,
        }

    def _classes(self, pred: Tensor) -> Tensor:
        """Return predicted classes (b, h, w) from logits or class maps."""
        if not pred.is_floating_point():
            return map_of("MeanIoU", "class map", pred).long()
        if pred.ndim != 4 or pred.shape[1] != self.num_classes:
            raise UserError(
                f"MeanIoU: float predictions are logits (b, {self.num_classes}, h, w), these are {tuple(pred.shape)}; "
                "class maps must be integers."
            )
        return require_numbers("MeanIoU", pred, infinite=True).argmax(1)

    def _in_range(self, what: str, values: Tensor, hint: str) -> None:
        strange = values[(values < 0) | (values >= self.num_classes)]
        if strange.numel():
            raise UserError(f"MeanIoU: {what} {int(strange[0])}; classes are 0 to {self.num_classes - 1}; {hint}.")


class Accuracy(Sums):
    """Top-1 accuracy over images, not a mean over classes.

    Args:
        num_classes: Number k of classes, 2 or more.
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = True
    correct: Tensor
    images: Tensor

    def __init__(self, num_classes: int, **options: object) -> None:
        super().__init__(**options)
        if num_classes < 2:
            raise UserError(f"Accuracy: num_classes = {num_classes}; it must be at least 2.")
        self.num_classes = num_classes
        self.add_sums(correct=(), images=())

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            pred: Logits float (b, k).
            target: Labels int64 (b,), in [0, k). Leave out images without a class.

        Raises:
            UserError: If a shape is wrong, a prediction is NaN, or a label is out of range.
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

    def compute(self) -> dict[str, float]:
        """Return "accuracy" in [0, 1] and the number of "images".

        Raises:
            UserError: If no image was added.
        """
        images = require_any("Accuracy", self.images, "image with a class", "give it data")
        return {"accuracy": int(self.correct) / images, "images": images}
