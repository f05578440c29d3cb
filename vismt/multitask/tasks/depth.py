"""Depth: L = mean over valid pixels of |p - g| in metres (InvPT, arXiv 2203.07997; LibMTL, arXiv 2203.14338).

A pixel is valid where 0 < g < max_depth. TaskPrompter takes max_depth = 80, the others no bound. The score is `measure`, pooled
over the data set: "rmse" (InvPT and TaskPrompter), "abs_err" or "abs_rel" (the two that LibMTL reports) or "log_rmse". All are
smooth functions of the sums over pixels, so the jackknife's interval holds. `convention`, "pooled" (InvPT, TaskPrompter) or
"libmtl", decides how the metric treats predictions that are not positive: vismt/multitask/metrics/depth.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vismt.multitask.tasks.base import NYUD_WEIGHTS, MapTask, check_choice, check_number

if TYPE_CHECKING:
    from torchmetrics import Metric

CONVENTIONS = {"pooled": "rmse", "libmtl": "abs_err"}  # default measure of each
LABELS = {
    "rmse": "RMSE",
    "abs_err": "mean absolute error",
    "abs_rel": "mean relative error",
    "log_rmse": "RMSE of the log",
}
LENGTHS = ("rmse", "abs_err")  # measures in the unit of the target
RAMP = (
    (0.99, 0.91, 0.15),
    (0.45, 0.80, 0.36),
    (0.13, 0.57, 0.55),
    (0.22, 0.35, 0.55),
    (0.27, 0.00, 0.33),
)  # colours from near to far


@dataclass(frozen=True, kw_only=True, eq=False)
class Depth(MapTask):
    """The task "depth".

    Args:
        max_depth: bound of valid depths in metres, excluded; None for no bound.
        convention: "pooled" or "libmtl".
        measure: score of the task; None for the convention's default.
        loss_weight: factor of the loss, > 0.
    """

    name, key, channels = "depth", "depth", 1
    lower_is_better = True
    inverse: ClassVar[bool] = False
    max_depth: float | None = None
    convention: str = "pooled"
    measure: str | None = None  # type: ignore[assignment]  # a name after __post_init__
    loss_weight: float = NYUD_WEIGHTS["depth"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_depth is not None:
            check_number(self.name, "max_depth", self.max_depth, 0, math.inf)
        check_choice(self.name, "convention", self.convention, CONVENTIONS)
        if self.measure is None:
            object.__setattr__(self, "measure", CONVENTIONS[self.convention])
        check_choice(self.name, "measure", self.measure, LABELS)

    @property
    def label(self) -> str:
        return LABELS[self.measure]

    @property
    def unit(self) -> str:
        return "m" if self.measure in LENGTHS and not self.inverse else ""

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
        """Return (near, far), the 1st and 99th percentile of depths of any shape, so that outliers do not take the colours."""
        order = values.flatten().sort().values  # torch.quantile is limited to 2^24 values
        low, high = order[round(0.01 * (len(order) - 1))], order[round(0.99 * (len(order) - 1))]
        return (high, low) if self.inverse else (low, high)

    def rescaled(self, prediction: Tensor, s: float) -> Tensor:
        """Convert the depth of an image enlarged s times to the unit of the original: enlarging by s divides depth by s."""
        return prediction / s if self.inverse else prediction * s

    def caption(self, prediction: Tensor, class_names: Sequence[str] = ()) -> str:
        """Return the range of depths."""
        nearest, farthest = self.ends(self.answer(prediction).float())
        return f"near {float(nearest):.2f} to far {float(farthest):.2f}"

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw near pixels bright, in the range of `ends` over the valid pixels."""
        depth = (self.answer(map) if predicted else map).float()
        visible = depth.isfinite() if predicted else self.valid(depth)
        reference = depth if like is None else like.reshape(like.shape[-2:]).float()
        values = reference[self.valid(reference)]
        if not values.numel():
            values = depth[visible] if visible.any() else depth.new_zeros(1)
        nearest, farthest = self.ends(values)
        distance = (nearest - depth) if self.inverse else (depth - nearest)
        place = (distance / (farthest - nearest).abs().clamp_min(1e-6)).nan_to_num(0.0).clamp(0, 1) * (len(RAMP) - 1)
        ramp, below = torch.tensor(RAMP), place.long().clamp_max(len(RAMP) - 2)
        return torch.lerp(ramp[below], ramp[below + 1], (place - below)[..., None]).movedim(-1, 0), visible


@dataclass(frozen=True, kw_only=True, eq=False)
class InverseDepth(Depth):
    """The task "depth" on data sets that store multiples of 1/depth, which are large for near pixels; options of `Depth`."""

    inverse = True

    @classmethod
    def of(cls, task: Depth) -> InverseDepth:
        """Return the inverse-depth task with the options of `task`."""
        return cls(**{field.name: getattr(task, field.name) for field in fields(task)})
