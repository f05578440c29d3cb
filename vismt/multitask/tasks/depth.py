"""Depth: L = mean over valid pixels of |p - g| in metres (InvPT, arXiv 2203.07997; LibMTL, arXiv 2203.14338).

A pixel is valid where 0 < g < max_depth. TaskPrompter takes max_depth = 80, the others no bound. The score is `measure`, pooled
over the data set: "rmse" (InvPT's line), "abs_err" or "abs_rel" (the two that LibMTL reports) or "log_rmse". All are smooth in
the sums that they are made of, so that an interval by the jackknife holds. `convention`, "pooled" (InvPT's line) or "libmtl",
decides about predictions that are not positive in the metric: vismt/multitask/metrics/depth.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vismt.errors import UserError, near
from vismt.multitask.tasks.base import NYUD_WEIGHTS, MapTask, between

if TYPE_CHECKING:
    from torchmetrics import Metric

CONVENTIONS = {"pooled": "rmse", "libmtl": "abs_err"}  # the measure of each
MEASURES = ("rmse", "abs_err", "abs_rel", "log_rmse")
RAMP = (
    (0.99, 0.91, 0.15),
    (0.45, 0.80, 0.36),
    (0.13, 0.57, 0.55),
    (0.22, 0.35, 0.55),
    (0.27, 0.00, 0.33),
)  # near to far


@dataclass(frozen=True, kw_only=True, eq=False)
class Depth(MapTask):
    """depth. max_depth: metres, excluded, None for no bound. convention: "pooled" or "libmtl". measure: None for its own."""

    name, key, channels = "depth", "depth", 1
    lower_is_better = True
    inverse: ClassVar[bool] = False
    max_depth: float | None = None
    convention: str = "pooled"
    measure: str | None = None
    loss_weight: float = NYUD_WEIGHTS["depth"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_depth is not None:
            between(self.name, "max_depth", self.max_depth, 0, math.inf)
        if self.convention not in CONVENTIONS:
            raise UserError(f"{self.name}: convention '{self.convention}'.{near(str(self.convention), CONVENTIONS)}")
        if self.measure is None:
            object.__setattr__(self, "measure", CONVENTIONS[self.convention])
        if self.measure not in MEASURES:
            raise UserError(f"{self.name}: measure '{self.measure}'.{near(str(self.measure), MEASURES)}")

    @property
    def _bound(self) -> float:
        return math.inf if self.max_depth is None else self.max_depth

    def valid(self, target: Tensor) -> Tensor:
        return (target > 0) & (target < self._bound)

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction[:, 0] - target).abs().mean()

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction[0]

    def metric(self) -> Metric:
        from vismt.multitask.metrics import DepthErrors

        return DepthErrors(valid_range=(0, self._bound), convention=self.convention)

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(near, far): the 1st and the 99th of 100 values of any number, so that a few odd ones do not take all colours."""
        order = values.flatten().sort().values  # torch.quantile ends at 2^24 values
        low, high = order[round(0.01 * (len(order) - 1))], order[round(0.99 * (len(order) - 1))]
        return (high, low) if self.inverse else (low, high)

    def rescaled(self, prediction: Tensor, s: float) -> Tensor:
        """What is predicted of a picture s times as large, in the unit of the picture: enlarging by s divides depth by s."""
        return prediction / s if self.inverse else prediction * s

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Near is bright, in the range of `ends` over the valid pixels."""
        depth = (self.answer(map) if predicted else map).float()
        shown = depth.isfinite() if predicted else self.valid(depth)
        scale = depth if like is None else like.reshape(like.shape[-2:]).float()
        kept = scale[self.valid(scale)]
        if not kept.numel():
            kept = depth[shown] if shown.any() else depth.new_zeros(1)
        near_by, far = self.ends(kept)
        away = (near_by - depth) if self.inverse else (depth - near_by)
        place = (away / (far - near_by).abs().clamp_min(1e-6)).nan_to_num(0.0).clamp(0, 1) * (len(RAMP) - 1)
        ramp, below = torch.tensor(RAMP), place.long().clamp_max(len(RAMP) - 2)
        return torch.lerp(ramp[below], ramp[below + 1], (place - below)[..., None]).movedim(-1, 0), shown


@dataclass(frozen=True, kw_only=True, eq=False)
class InverseDepth(Depth):
    """The task `depth` on sets that hold multiples of 1/depth, large where it is near: made of a Depth, whose options it has."""

    inverse = True

    @classmethod
    def of(cls, task: Depth) -> InverseDepth:
        """The task with the options of `task`."""
        return cls(**{field.name: getattr(task, field.name) for field in fields(task)})
