"""Surface normals: the head's vector p is scaled to unit length, n = p / |p|, and compared with the true normal g.

Loss by `convention`:

"invpt"   mean over valid pixels of sum_channels |n - g|            (InvPT, arXiv 2203.07997; TaskPrompter), weight 10
"astmt"   the same with a mean over channels, a third of it         (ASTMT, arXiv 1904.08918; MTLoRA), weight 10
"libmtl"  mean over valid pixels of 1 - n . g                       (LibMTL, arXiv 2203.14338), weight 1

Valid: g is not zero; in LibMTL the components of g do not sum to 0, which also drops genuine normals such as (1, -1, 0).
The score is the mean angle in degrees over all valid pixels of the data set. The metric also computes the median, which LibMTL
reports, but it cannot be the score: the jackknife, which gives the intervals, does not hold for a median.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vismt.multitask.tasks.base import PASCAL_WEIGHTS, MapTask, check_choice

if TYPE_CHECKING:
    from torchmetrics import Metric

CONVENTIONS = ("invpt", "astmt", "libmtl")
SHORTEST = 1e-4  # shorter vectors are divided by it instead, so that the gradient stays finite at 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Normals(MapTask):
    """The task "normals".

    Args:
        convention: "invpt", "astmt" or "libmtl", of the loss and of valid pixels.
        loss_weight: factor of the loss, > 0; None for the convention's default.
    """

    name, key, channels = "normals", "normals", 3
    measure, label, unit = "mean", "mean angle", "degrees"
    lower_is_better, vector = True, True
    convention: str = "invpt"
    loss_weight: float | None = None  # type: ignore[assignment]  # a number after __post_init__

    def __post_init__(self) -> None:
        check_choice(self.name, "convention", self.convention, CONVENTIONS)
        if self.loss_weight is None:
            object.__setattr__(self, "loss_weight", 1.0 if self.convention == "libmtl" else PASCAL_WEIGHTS["normals"])
        super().__post_init__()

    def valid(self, target: Tensor) -> Tensor:
        finite = target.isfinite().all(1)
        return finite & ((target.sum(1) != 0) if self.convention == "libmtl" else (target != 0).any(1))

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        normal = F.normalize(prediction, dim=1, eps=SHORTEST)
        if self.convention == "libmtl":
            return (1 - (normal * target).sum(1)).mean()
        error = (normal - target).abs()
        return error.sum(1).mean() if self.convention == "invpt" else error.mean()

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        """Return unit vectors; those of a mirrored image with the sign of x reversed."""
        normal = F.normalize(super().view(prediction, mirrored), dim=1, eps=SHORTEST)
        return normal * normal.new_tensor([-1.0, 1.0, 1.0])[:, None, None] if mirrored else normal

    def answer(self, prediction: Tensor) -> Tensor:
        return F.normalize(prediction.float(), dim=0, eps=SHORTEST)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import NormalErrors

        return NormalErrors(convention="libmtl" if self.convention == "libmtl" else "pooled")

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw x, y, z from -1 to 1 as red, green, blue."""
        normal = F.normalize(map.float().nan_to_num(0.0, 0.0, 0.0), dim=0, eps=1e-12)
        return (normal + 1) / 2, (normal != 0).any(0)
