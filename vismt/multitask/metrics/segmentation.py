"""Mean intersection over union from one confusion matrix of the whole data set.

    IoU_c = TP_c / (TP_c + FP_c + FN_c),   mIoU = mean_c IoU_c,   pixel accuracy = sum_c TP_c / pixels

Pixels with the ignore label enter none of the counts. A class that is nowhere, neither labelled nor predicted, has 0 / 0; the
literature differs on it: 0 that stays in the mean (Vandenhende et al., arXiv 2004.13379, InvPT, TaskPrompter), NaN that makes
the mean NaN (LibMTL, arXiv 2203.14338), or left out of the mean. A class that is predicted but not labelled has IoU 0 in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vismt.errors import UserError
from vismt.multitask.metrics.inputs import one_of, plane, same_size, seen, sound

ABSENT = ("zero", "skip", "nan")


class MeanIoU(Metric):
    """mIoU over `num_classes` classes, background included where it is one of them.

    ignore_index: label without a class, None when there is none. absent: what a class counts that is nowhere: "zero" (default,
    Vandenhende, InvPT, TaskPrompter), "nan" (LibMTL) or "skip". options: torchmetrics.Metric's.
    """

    full_state_update, higher_is_better, is_differentiable = False, True, False
    confusion: Tensor

    def __init__(
        self, num_classes: int, *, ignore_index: int | None = 255, absent: str = "zero", **options: Any
    ) -> None:
        super().__init__(**options)
        if num_classes < 2:
            raise UserError(f"MeanIoU: num_classes = {num_classes}: at least 2; background counts as one.")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.absent = one_of("MeanIoU", "absent", absent, ABSENT)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """One batch. pred: float logits (b, k, h, w), or int classes (b, h, w) or (b, 1, h, w). target: int, as classes.

        An image with nothing but ignored pixels adds nothing. Raises UserError for sizes that differ, labels or predicted
        classes outside [0, k) at pixels that count, NaN, and targets that are not integers.
        """
        if target.is_floating_point():
            raise UserError(
                f"MeanIoU: the target must hold integer labels, is {target.dtype}: convert it with .long()."
            )
        target = plane("MeanIoU", "target", target).long()
        classes = self._classes(pred)
        same_size("MeanIoU", classes, target, "label map")
        target = target.to(classes.device)
        valid = torch.ones_like(target, dtype=torch.bool) if self.ignore_index is None else target != self.ignore_index
        classes, target = classes[valid], target[valid]
        self._in_range("label", target, f"ignore_index is {self.ignore_index}")
        self._in_range("predicted class", classes, "predict one of the classes everywhere")
        found = multiclass_confusion_matrix(classes, target, self.num_classes, validate_args=False)
        self.confusion += found.to(self.confusion.device)

    def compute(self) -> dict[str, Any]:
        """miou, pixel_accuracy in [0, 1]; iou: list of k floats, NaN where left out; pixels: how many were counted.

        Raises UserError when no labelled pixel was seen.
        """
        pixels = seen(
            "MeanIoU", self.confusion.sum(), "labelled pixel", f"give it data, check ignore_index={self.ignore_index}"
        )
        confusion = self.confusion.cpu().double()
        true = confusion.diag()
        iou = true / (confusion.sum(0) + confusion.sum(1) - true)
        if self.absent == "zero":
            iou = iou.nan_to_num(0.0)
        mean = iou.nanmean() if self.absent == "skip" else iou.mean()
        return {
            "miou": float(mean),
            "iou": iou.tolist(),
            "pixel_accuracy": float(true.sum() / pixels),
            "pixels": pixels,
        }

    def _classes(self, pred: Tensor) -> Tensor:
        if not pred.is_floating_point():
            return plane("MeanIoU", "class map", pred).long()
        if pred.ndim != 4 or pred.shape[1] != self.num_classes:
            raise UserError(
                f"MeanIoU: float predictions are logits (b, {self.num_classes}, h, w), these are {tuple(pred.shape)}; "
                f"class maps must be integers."
            )
        return sound("MeanIoU", pred, infinite=True).argmax(1)

    def _in_range(self, what: str, values: Tensor, hint: str) -> None:
        strange = values[(values < 0) | (values >= self.num_classes)]
        if strange.numel():
            raise UserError(
                f"MeanIoU: {what} {int(strange[0])} found, classes are 0 to {self.num_classes - 1}; {hint}."
            )
