"""Surface normals. The head's vector is scaled to unit length, n = p / |p|, and compared with the true g by `convention`:

"invpt"   mean over valid pixels of sum_channels |n - g|            (InvPT, arXiv 2203.07997; TaskPrompter), weight 10
"astmt"   the same, but a mean over channels, a third of it         (ASTMT, arXiv 1904.08918; MTLoRA), weight 10
"libmtl"  mean over valid pixels of 1 - n . g                       (LibMTL, arXiv 2203.14338), weight 1

Valid: g is not zero; in LibMTL its components do not sum to 0, which drops genuine normals such as (1, -1, 0) as well.
The score is the mean angle in degrees over all valid pixels of the data set. The median, which LibMTL reports beside it, is among
the metric's numbers and is no score: the jackknife, which gives the intervals, does not hold for a median.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vismt.errors import UserError, near
from vismt.multitask.tasks.base import PASCAL_WEIGHTS, MapTask

if TYPE_CHECKING:
    from torchmetrics import Metric

CONVENTIONS = ("invpt", "astmt", "libmtl")
SHORTEST = 1e-4  # shorter vectors are divided by it instead, so that the gradient stays finite at 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Normals(MapTask):
    """normals. convention: of the loss and of valid pixels. loss_weight: None for the convention's."""

    name, key, measure, channels = "normals", "normals", "mean", 3
    lower_is_better, vector = True, True
    convention: str = "invpt"
    loss_weight: float | None = None

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise UserError(f"{self.name}: convention '{self.convention}'.{near(str(self.convention), CONVENTIONS)}")
        if self.loss_weight is None:
            object.__setattr__(self, "loss_weight", 1.0 if self.convention == "libmtl" else PASCAL_WEIGHTS["normals"])
        super().__post_init__()

    def valid(self, target: Tensor) -> Tensor:
        directed = target.isfinite().all(1)
        return directed & ((target.sum(1) != 0) if self.convention == "libmtl" else (target != 0).any(1))

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        normal = F.normalize(prediction, dim=1, eps=SHORTEST)
        if self.convention == "libmtl":
            return (1 - (normal * target).sum(1)).mean()
        apart = (normal - target).abs()
        return apart.sum(1).mean() if self.convention == "invpt" else apart.mean()

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        """Unit vectors; those of the mirrored image with x turned back."""
        normal = F.normalize(super().view(prediction, mirrored), dim=1, eps=SHORTEST)
        return normal * normal.new_tensor([-1.0, 1.0, 1.0])[:, None, None] if mirrored else normal

    def answer(self, prediction: Tensor) -> Tensor:
        return F.normalize(prediction.float(), dim=0, eps=SHORTEST)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import NormalErrors

        return NormalErrors(convention="libmtl" if self.convention == "libmtl" else "pooled")

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, y, z from -1 to 1 as red, green, blue."""
        normal = F.normalize(map.float().nan_to_num(0.0, 0.0, 0.0), dim=0, eps=1e-12)
        return (normal + 1) / 2, (normal != 0).any(0)
