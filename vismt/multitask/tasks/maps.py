"""Tasks with a map of numbers: boundaries, saliency, depth and surface normals.

Boundaries and saliency are binary maps with few positive pixels, with the weighted loss

    L = mean over valid pixels of   w y softplus(-z) + (1 - w) (1 - y) softplus(z)

z is the single logit, or the difference z_1 - z_0 of two logits, for which L is the weighted cross-entropy of their softmax.
The mean divides by the number of pixels (Vandenhende et al., arXiv 2004.13379, InvPT, arXiv 2203.07997). torch's mean of a
weighted cross-entropy divides by the sum of the weights and is another loss. w is a number, or None ("balanced") for w =
#negative / #valid of the batch (HED, arXiv 1504.06375). A batch without positives then has w = 1 and loss 0. w also depends on
how the batch is split over processes.

    boundaries  w = 0.95, loss weight 50: ASTMT (arXiv 1904.08918), InvPT, TaskPrompter, MTLoRA. The score is odsF with max_dist
                0.0075 of the diagonal for PASCAL and 0.011 for NYUD
    saliency    w balanced. Two conventions for the head, with the same loss when z = z_1 - z_0: channels = 2 (InvPT,
                TaskPrompter) or 1 (ASTMT, MTLoRA). Two for the score: "max_f", beta^2 = 0.3 (InvPT, TaskPrompter), or "miou" of
                background and salient (Vandenhende et al.; MTLoRA) at the threshold 1/2

Depth: L = mean over valid pixels of |p - g| in metres (InvPT, LibMTL, arXiv 2203.14338). A pixel is valid if 0 < g < max_depth.
TaskPrompter takes max_depth = 80, the others no bound. The score is `measure`, pooled over the data set: "rmse" (InvPT and
TaskPrompter), "abs_err" or "abs_rel" (both of LibMTL) or "log_rmse". All are smooth functions of the sums over pixels, so the
jackknife's interval holds. `convention`, "pooled" (InvPT, TaskPrompter) or "libmtl", decides how the metric treats predictions
that are not positive: vismt/multitask/metrics/depth.py. What a run writes and draws is what is scored.

Normals: the head's vector p is scaled to unit length, n = p / |p|, and compared with the true normal g by `convention`:

    "invpt"     mean over valid pixels of sum_channels |n - g|            (InvPT; TaskPrompter), weight 10
    "astmt"     the same with a mean over channels, a third of it         (ASTMT; MTLoRA), weight 10
    "libmtl"    mean over valid pixels of 1 - n . g                       (LibMTL), weight 1

A normal is valid if g is not zero. In LibMTL it is valid if the components of g do not sum to 0, which also drops genuine
normals such as (1, -1, 0). The score is the mean angle in degrees over all valid pixels of the data set. The metric also
computes the median, which LibMTL reports, but it cannot be the score: the jackknife, which gives the intervals, does not hold
for a median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError, need_whole, require_known, shown_value
from vismt.multitask.tasks.base import (
    IGNORE,
    NYUD_WEIGHTS,
    PASCAL_WEIGHTS,
    TASKS,
    LabelTask,
    MapTask,
    Number,
    check_number,
    log_frequencies,
)
from vismt.multitask.tasks.classes import CLASS_NUMBERS

if TYPE_CHECKING:
    from torchmetrics import Metric

PASCAL_MAX_DIST = 0.0075
SALIENCY_NUMBERS = {"max_f": {"max_f": Number("maxF", share=True)}, "miou": CLASS_NUMBERS}  # by measure
DEPTH_CONVENTIONS = {"pooled": "rmse", "libmtl": "abs_err"}  # default measure of each convention
DEPTH_NUMBERS = {
    "rmse": Number("RMSE", "m", lower_is_better=True),
    "abs_err": Number("mean absolute error", "m", lower_is_better=True),
    "abs_rel": Number("mean relative error", lower_is_better=True),
    "sq_rel": Number("mean squared relative error", "m", lower_is_better=True),
    "log_rmse": Number("RMSE of the log", lower_is_better=True),
    **{f"delta{power}": Number(f"delta {power}", share=True) for power in (1, 2, 3)},
}
DEPTH_MEASURES = ("rmse", "abs_err", "abs_rel", "log_rmse")  # measures that can be the score
RAMP = (
    (0.99, 0.91, 0.15),
    (0.45, 0.80, 0.36),
    (0.13, 0.57, 0.55),
    (0.22, 0.35, 0.55),
    (0.27, 0.00, 0.33),
)  # colours from near to far
NORMALS_NUMBERS = {
    "mean": Number("mean angle", "degrees", lower_is_better=True),
    "rmse": Number("root mean square angle", "degrees", lower_is_better=True),
    **{f"within_{limit}": Number(f"within {limit} degrees", share=True) for limit in ("11.25", "22.5", "30")},
}
NORMALS_CONVENTIONS = ("invpt", "astmt", "libmtl")
SHORTEST = 1e-4  # shorter vectors are divided by this length, so that the gradient stays finite at 0


@dataclass(frozen=True, kw_only=True, eq=False)
class BinaryTask(LabelTask):
    """Base class of binary maps.

    Args:
        positive_weight: Weight w in (0, 1). None for the balanced weight.
        loss_weight: Factor of the loss, > 0.
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

    def constant(self, values: Tensor) -> Tensor:
        """Return logits of the share of positive pixels."""
        negative, positive = log_frequencies(values, self.classes)
        return torch.stack([negative, positive] if self.channels == 2 else [positive - negative])

    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw the probability as grey."""
        if predicted:
            grey = self.answer(map)
            return grey.nan_to_num(0.0).expand(3, -1, -1), ~grey.isnan()
        self.check_labels(map)
        visible = self.valid(map)
        return map.where(visible, 0).float().expand(3, -1, -1), visible


@TASKS.register("edge")
@dataclass(frozen=True, kw_only=True, eq=False)
class Edges(BinaryTask):
    """The task "edge".

    Args:
        positive_weight: Weight w in (0, 1). None for the balanced weight.
        max_dist: Largest distance of matched pixels in the metric, as a fraction of the image diagonal.
        thresholds: Number of thresholds of the metric. Fewer are faster.
        loss_weight: Factor of the loss, > 0.
    """

    name, key, channels = "edge", "edge", 1
    measure = "ods_f"
    numbers = {"ods_f": Number("odsF", share=True), "ois_f": Number("oisF", share=True)}  # noqa: RUF012  # a constant
    positive_weight: float | None = 0.95
    max_dist: float = PASCAL_MAX_DIST
    thresholds: int = 99
    loss_weight: float = PASCAL_WEIGHTS["edge"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "max_dist", self.max_dist, 0, 1)
        need_whole(f"{self.name}: thresholds", self.thresholds)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import BoundaryF

        return BoundaryF(max_dist=self.max_dist, thresholds=self.thresholds, ignore_index=IGNORE)


@TASKS.register("saliency")
@dataclass(frozen=True, kw_only=True, eq=False)
class Saliency(BinaryTask):
    """The task "saliency".

    Args:
        positive_weight: Weight w in (0, 1). None for the balanced weight.
        channels: Number of channels of the head, 2 or 1.
        measure: Score of the task, "max_f" or "miou".
        loss_weight: Factor of the loss, > 0.
    """

    name, key = "saliency", "saliency"
    channels: int = 2
    measure: str = "max_f"
    loss_weight: float = PASCAL_WEIGHTS["saliency"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 2):
            raise UserError(f"{self.name}: channels {shown_value(self.channels)}; 2 (background, salient) or 1.")
        require_known(f"{self.name}: measure", [self.measure], SALIENCY_NUMBERS)

    @property
    def numbers(self) -> Mapping[str, Number]:
        return SALIENCY_NUMBERS[self.measure]

    def metric(self) -> Metric:
        from vismt.multitask.metrics import MaxF, MeanIoU

        return MaxF(ignore_index=IGNORE) if self.measure == "max_f" else MeanIoU(2, ignore_index=IGNORE)

    def count(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        if self.measure == "miou":
            prediction = (self.margin(prediction.movedim(1, -1)) > 0).long()
        metric.update(prediction, target)


@TASKS.register("depth")
@dataclass(frozen=True, kw_only=True, eq=False)
class Depth(MapTask):
    """The task "depth".

    Args:
        max_depth: Bound of valid depths in metres, excluded. None for no bound.
        convention: "pooled" or "libmtl", for predictions that are not positive.
        measure: Score of the task, "rmse", "abs_err", "abs_rel" or "log_rmse". None for "rmse" with "pooled" and "abs_err" with
            "libmtl". The other measures are reported beside it.
        loss_weight: Factor of the loss, > 0.
    """

    name, key, channels = "depth", "depth", 1
    inverse: ClassVar[bool] = False
    max_depth: float | None = None
    convention: str = "pooled"
    measure: str | None = None  # type: ignore[assignment]  # a name after __post_init__
    loss_weight: float = NYUD_WEIGHTS["depth"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_depth is not None:
            check_number(self.name, "max_depth", self.max_depth, 0, math.inf)
        require_known(f"{self.name}: convention", [self.convention], DEPTH_CONVENTIONS)
        if self.measure is None:
            object.__setattr__(self, "measure", DEPTH_CONVENTIONS[self.convention])
        require_known(f"{self.name}: measure", [str(self.measure)], DEPTH_MEASURES)

    @property
    def numbers(self) -> Mapping[str, Number]:
        if not self.inverse:
            return DEPTH_NUMBERS
        return {key: replace(number, unit="") for key, number in DEPTH_NUMBERS.items()}

    @property
    def _bound(self) -> float:
        return math.inf if self.max_depth is None else self.max_depth

    def valid(self, target: Tensor) -> Tensor:
        return (target > 0) & (target < self._bound)

    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction[:, 0] - target).abs().mean()

    def answer(self, prediction: Tensor) -> Tensor:
        """Return the depths that are scored."""
        from vismt.multitask.metrics.depth import LEAST

        return prediction[0] if self.convention == "libmtl" else prediction[0].clamp_min(LEAST)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import DepthErrors

        return DepthErrors(valid_range=(0, self._bound), convention=self.convention)

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (near, far), the 1st and 99th percentile of depths of any shape, so that outliers do not take the colours."""
        order = values.flatten().sort().values  # torch.quantile is limited to 2^24 values
        low, high = order[round(0.01 * (len(order) - 1))], order[round(0.99 * (len(order) - 1))]
        return (high, low) if self.inverse else (low, high)

    def rescaled(self, prediction: Tensor, s: float) -> Tensor:
        """Convert the depth of an image enlarged s times to the unit of the original. Enlarging by s divides depth by s."""
        return prediction / s if self.inverse else prediction * s

    def caption(self, prediction: Tensor, class_names: Sequence[str] = ()) -> str:
        """Return the range of depths, of which none is negative."""
        nearest, farthest = self.ends(self.answer(prediction).float().clamp_min(0))
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
    """The task "depth" on data sets that store multiples of 1/depth, which are large for near pixels.

    It has the options of `Depth`.
    """

    inverse = True

    @classmethod
    def of(cls, task: Depth) -> InverseDepth:
        """Return the inverse-depth task with the options of `task`."""
        return cls(**{field.name: getattr(task, field.name) for field in fields(task)})


@TASKS.register("normals")
@dataclass(frozen=True, kw_only=True, eq=False)
class Normals(MapTask):
    """The task "normals".

    Args:
        convention: Convention of the loss and of valid pixels: "invpt", "astmt" or "libmtl".
        loss_weight: Factor of the loss, > 0. None for the convention's default.
    """

    name, key, channels = "normals", "normals", 3
    measure = "mean"
    numbers = NORMALS_NUMBERS
    vector = True
    convention: str = "invpt"
    loss_weight: float | None = None  # type: ignore[assignment]  # a number after __post_init__

    def __post_init__(self) -> None:
        require_known(f"{self.name}: convention", [self.convention], NORMALS_CONVENTIONS)
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
        """Return unit vectors. For a mirrored image, the sign of x is reversed."""
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
