"""Yes or no at every pixel, the few weighed up: what boundaries and saliency share.

    L = mean over valid pixels of   w y softplus(-z) + (1 - w) (1 - y) softplus(z)

with z the one logit, or the difference z_1 - z_0 of two, for which this is the weighted cross-entropy of their softmax. The
mean divides by the number of pixels (Vandenhende et al., arXiv 2004.13379; InvPT, arXiv 2203.07997); torch's mean of a
weighted cross-entropy divides by the sum of the weights and is another loss. Two conventions for w:

a number               0.95 for boundaries, by hand
None ("balanced")      w = #negative / #valid of the batch at hand (HED, arXiv 1504.06375). A batch without positives has
                       w = 1, and its loss is 0; it also differs between one process and several
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vismt.multitask.tasks.base import LabelTask, between


@dataclass(frozen=True, kw_only=True, eq=False)
class BinaryTask(LabelTask):
    """positive_weight: w in (0, 1), or None for the balanced one."""

    classes: ClassVar[int] = 2
    positive_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weight is not None:
            between(self.name, "positive_weight", self.positive_weight, 0, 1)

    def margin(self, prediction: Tensor) -> Tensor:
        """z, without the dimension of channels, of (..., channels)."""
        return prediction[..., 0] if self.channels == 1 else prediction[..., 1] - prediction[..., 0]

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        positive = target.to(prediction.dtype)
        w = 1 - positive.mean() if self.positive_weight is None else self.positive_weight
        weight = w * positive + (1 - w) * (1 - positive)
        return F.binary_cross_entropy_with_logits(self.margin(prediction), positive, weight)

    def answer(self, prediction: Tensor) -> Tensor:
        return self.margin(prediction.float().movedim(0, -1)).sigmoid()

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probability as grey."""
        if predicted:
            grey = self.answer(map)
            return grey.nan_to_num(0.0).expand(3, -1, -1), ~grey.isnan()
        self.check_labels(map)
        shown = self.valid(map)
        return map.where(shown, 0).float().expand(3, -1, -1), shown
