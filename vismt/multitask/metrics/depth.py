"""Errors of depth maps, pooled over all valid pixels of the data set. The root is taken once, never per image.

    rmse = sqrt(mean (p - g)^2)              abs_err = mean |p - g|            log_rmse = sqrt(mean (ln p - ln g)^2)
    abs_rel = mean |p - g| / g               sq_rel = mean (p - g)^2 / g       delta_k = share with max(p / g, g / p) < 1.25^k

There are two conventions:

"pooled"  Vandenhende et al. (arXiv 2004.13379), InvPT, TaskPrompter: predictions are clamped to at least 1e-9 in every error.
Valid there: g != 255 in the older code (`ignore=255`), 0 < g < 80 in TaskPrompter (`valid_range=(0, 80)`).

"libmtl"  LibMTL (arXiv 2203.14338): predictions enter rmse, abs_err and the relative errors without clamping. Valid: g != 0. It
reports abs_err and abs_rel.

log_rmse and delta_k clamp in both, because a negative prediction has no logarithm and would pass max(p / g, g / p) < 1.25.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.multitask.metrics.inputs import (
    Sums,
    apply_mask,
    check_same_size,
    map_of,
    require_any,
    require_numbers,
    to_fp64,
)

_CONVENTIONS = ("pooled", "libmtl")
POWERS = 3
LEAST = 1e-9  # smallest predicted depth (a depth of 0 has no logarithm)


class DepthErrors(Sums):
    """Depth errors in the unit of the target.

    A target pixel is valid if g is finite and satisfies the mask of `update`, `valid_range` and `ignore`.

    Args:
        valid_range: Bounds (min, max) of valid depths, both excluded. None for no bounds.
        ignore: Depth of pixels without a value. None for no such depth.
        convention: "pooled" or "libmtl", see the module's docstring.
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = False
    sums: Tensor  # sums of squared, squared log, absolute, relative and squared relative errors
    within: Tensor
    pixels: Tensor

    def __init__(
        self,
        *,
        valid_range: tuple[float, float] | None = None,
        ignore: float | None = 0.0,
        convention: str = "pooled",
        **options: object,
    ) -> None:
        super().__init__(**options)
        if valid_range is not None and not valid_range[0] < valid_range[1]:
            raise UserError(f"DepthErrors: valid_range {valid_range} is empty; give (min, max), both excluded.")
        self.valid_range, self.ignore = valid_range, ignore
        require_known("DepthErrors: convention", [convention], _CONVENTIONS)
        self.convention = convention
        self.add_sums(torch.float64, sums=(5,))
        self.add_sums(within=(POWERS,), pixels=())

    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch. Images without a valid pixel do not count.

        Args:
            pred: Depths float (b, h, w) or (b, 1, h, w).
            target: Depths float (b, h, w) or (b, 1, h, w).
            mask: Mask bool in the shape of target, True at valid pixels.

        Raises:
            UserError: If sizes differ, a prediction at a valid pixel is not finite, or a valid target is not positive.
        """
        pred = map_of("DepthErrors", "prediction", pred)
        target = map_of("DepthErrors", "target", target).to(pred.device)
        check_same_size("DepthErrors", pred, target)
        valid = apply_mask("DepthErrors", self._valid(target), mask)
        pred, target = to_fp64(require_numbers("DepthErrors", pred[valid])), to_fp64(target[valid])
        if target.numel() and float(target.min()) <= 0:
            raise UserError(
                f"DepthErrors: a valid target is {float(target.min()):.3g}, but depths are positive. Leave such pixels out by "
                "mask, ignore or valid_range=(0, max)."
            )
        clamped = pred.clamp_min(LEAST)
        pred = clamped if self.convention == "pooled" else pred
        error = (pred - target).abs()
        log_error = clamped.log() - target.log()
        terms = (error.square(), log_error.square(), error, error / target, error.square() / target)
        ratio = torch.maximum(clamped / target, target / clamped)
        self.sums += torch.stack([term.sum() for term in terms]).to(self.sums.device)
        within = torch.stack([(ratio < 1.25**power).sum() for power in range(1, POWERS + 1)])
        self.within += within.to(self.within.device)
        self.pixels += pred.numel()

    def compute(self) -> dict[str, float]:
        """Return the errors.

        Returns:
            Numbers by name: "rmse" and "abs_err" in the target's unit, "log_rmse" (natural logarithm), "abs_rel", "sq_rel",
            "delta1" to "delta3" in [0, 1], and the number of valid "pixels".

        Raises:
            UserError: If no pixel is valid.
        """
        fix = "give it data, check mask, valid_range and ignore"
        pixels = require_any("DepthErrors", self.pixels, "valid pixel", fix)
        squared, squared_log, *means = (self.sums / pixels).tolist()
        errors = {
            "rmse": squared**0.5,
            "log_rmse": squared_log**0.5,
            **dict(zip(("abs_err", "abs_rel", "sq_rel"), means)),
        }
        shares = {f"delta{power}": int(count) / pixels for power, count in enumerate(self.within, 1)}
        return {**errors, **shares, "pixels": pixels}

    def _valid(self, target: Tensor) -> Tensor:
        valid = target.isfinite()
        if self.ignore is not None:
            valid &= target != self.ignore
        if self.valid_range is not None:
            low, high = self.valid_range
            valid &= (target > low) & (target < high)
        return valid
