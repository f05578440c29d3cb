"""Angles between predicted and true surface normals in degrees, pooled over all valid pixels of the data set.

    angle = 2 atan2(|p - g|, |p + g|)

with p and g of unit length (InvPT, TaskPrompter). The arccos of p . g within [-1, 1] (ASTMT, LibMTL) is less exact near 0. The
mean is over pixels (Vandenhende's online evaluation calls this mean "rmse"). rmse here is the root of the mean squared angle.
The mean, rmse and the shares are exact. The median is read from a histogram of 0.001 degree steps, which bounds memory and can
be added over processes. It is within 0.0005 degrees of the median of all angles.

Conventions for pixels without a normal, in addition to `mask`: "pooled"  g = (255, 255, 255) (Vandenhende, InvPT,
TaskPrompter), g = 0, or a component that is not finite. "libmtl"  the components of g sum to 0 (LibMTL, arXiv 2203.14338),
which also drops genuine normals such as (1, -1, 0). A predicted zero vector has no direction and counts as 90 degrees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.multitask.metrics.inputs import Sums, apply_mask, check_same_size, require_any, require_numbers, to_fp64

_CONVENTIONS = ("pooled", "libmtl")
LIMITS = (11.25, 22.5, 30.0)
_STEPS = 1000  # steps of the histogram, per degree
_MARK = 255


class NormalErrors(Sums):
    """Angular errors of surface normals.

    Args:
        convention: "pooled" or "libmtl", see the module's docstring.
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = False
    sums: Tensor  # sums of angles and of squared angles
    within: Tensor
    histogram: Tensor  # counts of angles rounded to steps
    pixels: Tensor

    def __init__(self, *, convention: str = "pooled", **options: object) -> None:
        super().__init__(**options)
        require_known("NormalErrors: convention", [convention], _CONVENTIONS)
        self.convention = convention
        self.add_sums(torch.float64, sums=(2,))
        self.add_sums(within=(len(LIMITS),), histogram=(180 * _STEPS + 1,), pixels=())

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch. Images without a valid pixel do not count. Zero targets do not count either, whatever the mask.

        Args:
            pred: Vectors float (b, 3, h, w) of any length, which are scaled to unit length.
            target: Vectors float (b, 3, h, w).
            mask: Mask bool (b, h, w) or (b, 1, h, w), True at valid pixels.

        Raises:
            UserError: If a shape is wrong, sizes differ, or a prediction at a valid pixel is not finite.
        """
        for what, values in (("prediction", pred), ("target", target)):
            if values.ndim != 4 or values.shape[1] != 3:
                raise UserError(f"NormalErrors: the {what} must be (b, 3, h, w), is {tuple(values.shape)}.")
        check_same_size("NormalErrors", pred, target)
        target = target.to(pred.device)
        known = (target != _MARK).any(1) if self.convention == "pooled" else target.sum(1) != 0
        valid = apply_mask("NormalErrors", known & target.isfinite().all(1) & (target != 0).any(1), mask)
        p = _unit(require_numbers("NormalErrors", pred.movedim(1, -1)[valid]))
        g = _unit(target.movedim(1, -1)[valid])
        degrees = 2 * torch.atan2((p - g).norm(dim=-1), (p + g).norm(dim=-1)).rad2deg()
        self.sums += torch.stack([degrees.sum(), degrees.square().sum()]).to(self.sums.device)
        self.within += torch.stack([(degrees < limit).sum() for limit in LIMITS]).to(self.within.device)
        steps = (degrees * _STEPS).round().long().clamp_max(180 * _STEPS)
        # On the CPU counting is deterministic and allowed under torch.use_deterministic_algorithms.
        self.histogram += steps.cpu().bincount(minlength=len(self.histogram)).to(self.histogram.device)
        self.pixels += degrees.numel()

    def compute(self) -> dict[str, float]:
        """Return the errors.

        Returns:
            Numbers by name: "mean", "median" and "rmse" in degrees, "within_11.25", "within_22.5" and "within_30" in [0, 1],
            and the number of valid "pixels".

        Raises:
            UserError: If no pixel is valid.
        """
        pixels = require_any("NormalErrors", self.pixels, "valid pixel", "give it data, check the mask and the targets")
        mean, square = (self.sums / pixels).tolist()
        # The median of an even number of values is the mean of the middle two, as in numpy.
        middle = torch.tensor([(pixels - 1) // 2, pixels // 2])
        steps = torch.searchsorted(self.histogram.cpu().cumsum(0), middle, right=True)
        shares = {f"within_{limit:g}": int(count) / pixels for limit, count in zip(LIMITS, self.within)}
        median = float(steps.double().mean()) / _STEPS
        return {"mean": mean, "median": median, "rmse": square**0.5, **shares, "pixels": pixels}


def _unit(vectors: Tensor) -> Tensor:
    vectors = to_fp64(vectors)
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.where(length > 0, 1.0)
