"""Binary maps with few positive pixels: the weighted loss that boundaries and saliency share.

    L = mean over valid pixels of   w y softplus(-z) + (1 - w) (1 - y) softplus(z)

z is the single logit, or the difference z_1 - z_0 of two logits, for which L is the weighted cross-entropy of their softmax. The
mean divides by the number of pixels (Vandenhende et al., arXiv 2004.13379; InvPT, arXiv 2203.07997); torch's mean of a
weighted cross-entropy divides by the sum of the weights and is a different loss. Two conventions for w:

a number               such as 0.95 for boundaries
None ("balanced")      w = #negative / #valid of the batch (HED, arXiv 1504.06375). A batch without positives has w = 1 and
                       loss 0; w also depends on how the batch is split over processes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vismt.multitask.tasks.base import LabelTask, check_number


@dataclass(frozen=True, kw_only=True, eq=False)
class BinaryTask(LabelTask):
    """Base class of binary maps.

    Args:
        positive_weight: w in (0, 1), or None for the balanced weight.
        loss_weight: factor of the loss, > 0.
    """

    classes = 2
    positive_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weight is not None:
            check_number(self.name, "positive_weight", self.positive_weight, 0, 1)

    def margin(self, prediction: Tensor) -> Tensor:
        """Return z of logits (..., channels), without the dimension of channels."""
        return prediction[..., 0] if self.channels == 1 else prediction[..., 1] - prediction[..., 0]

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        positive = target.to(prediction.dtype)
        w = 1 - positive.mean() if self.positive_weight is None else self.positive_weight
        weight = w * positive + (1 - w) * (1 - positive)
        return F.binary_cross_entropy_with_logits(self.margin(prediction), positive, weight)

    def answer(self, prediction: Tensor) -> Tensor:
        return self.margin(prediction.float().movedim(0, -1)).sigmoid()

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw the probability as grey."""
        if predicted:
            grey = self.answer(map)
            return grey.nan_to_num(0.0).expand(3, -1, -1), ~grey.isnan()
        self.check_labels(map)
        visible = self.valid(map)
        return map.where(visible, 0).float().expand(3, -1, -1), visible
