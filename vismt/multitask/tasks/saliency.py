"""Saliency: class-balanced cross-entropy (binary.py) with w = #background / #valid, computed on the batch's valid pixels.

Two conventions for the head, with the same loss when z = z_1 - z_0: channels = 2 (InvPT, TaskPrompter) or 1 (ASTMT, MTLoRA).
Two for the score: "max_f", beta^2 = 0.3 (InvPT, TaskPrompter), or "miou" of background and salient (Vandenhende et al., arXiv
2004.13379; MTLoRA) at the threshold 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.tasks.base import IGNORE, PASCAL_WEIGHTS, check_choice
from vismt.multitask.tasks.binary import BinaryTask

if TYPE_CHECKING:
    from torchmetrics import Metric

LABELS = {"max_f": "maxF", "miou": "mIoU"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Saliency(BinaryTask):
    """The task "saliency".

    Args:
        positive_weight: w in (0, 1), or None for the balanced weight.
        channels: of the head, 2 or 1.
        measure: score of the task, "max_f" or "miou".
        loss_weight: factor of the loss, > 0.
    """

    name, key, share = "saliency", "saliency", True
    channels: int = 2
    measure: str = "max_f"
    loss_weight: float = PASCAL_WEIGHTS["saliency"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 2):
            raise UserError(f"{self.name}: channels {self.channels!r}; 2 (background, salient) or 1.")
        check_choice(self.name, "measure", self.measure, LABELS)

    @property
    def label(self) -> str:
        return LABELS[self.measure]

    def metric(self) -> Metric:
        from vismt.multitask.metrics import MaxF, MeanIoU

        return MaxF(ignore_index=IGNORE) if self.measure == "max_f" else MeanIoU(2, ignore_index=IGNORE)

    def count(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        if self.measure == "miou":
            prediction = (self.margin(prediction.movedim(1, -1)) > 0).long()
        metric.update(prediction, target)
