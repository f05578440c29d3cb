"""The base class of the metrics, and checks and conversions of their inputs.

The checks take the name of the metric for errors.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics import Metric

from vismt.base.errors import UserError


class Sums(Metric):
    """A metric whose states are sums over the data set."""

    full_state_update, is_differentiable = False, False

    def add_sums(self, dtype: torch.dtype = torch.long, **shapes: tuple[int, ...]) -> None:
        """Add a state of zeros for each name."""
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


def map_of(metric: str, what: str, values: Tensor) -> Tensor:
    """Return (b, h, w) from (b, h, w) or (b, 1, h, w), any dtype. Raise UserError for other shapes."""
    if values.ndim == 4 and values.shape[1] == 1:
        return rearrange(values, "b 1 h w -> b h w")
    if values.ndim != 3:
        raise UserError(f"{metric}: the {what} must be (b, h, w) or (b, 1, h, w), is {tuple(values.shape)}.")
    return values


def check_same_size(metric: str, pred: Tensor, target: Tensor, what: str = "target") -> None:
    """Raise UserError unless pred and target, both (b, ..., h, w), have the same batch size, height and width."""
    height, width = pred.shape[-2:]
    target_height, target_width = target.shape[-2:]
    if (height, width) != (target_height, target_width):
        raise UserError(
            f"{metric}: the prediction is {height} x {width} pixels, the {what} {target_height} x {target_width}; resize the "
            f"prediction to the {what}'s size (bilinear, before any argmax), never the {what}."
        )
    if len(pred) != len(target):
        raise UserError(
            f"{metric}: {len(pred)} predictions, but {len(target)} of the {what}; give both for the same images."
        )


def to_fp64(values: Tensor) -> Tensor:
    """Convert to fp64, on the CPU for values on an MPS device, which has no fp64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def require_numbers(metric: str, pred: Tensor, infinite: bool = False) -> Tensor:
    """Return `pred`. Raise UserError for NaN and, unless `infinite`, for infinite values, which logits may hold."""
    broken = int((pred.isnan() if infinite else ~pred.isfinite()).sum())
    if broken:
        kind = "NaN" if infinite else "NaN or infinite"
        raise UserError(f"{metric}: {broken} predicted values are {kind}; the model has diverged, or divides by zero.")
    return pred


def apply_mask(metric: str, valid: Tensor, mask: Tensor | None) -> Tensor:
    """Return valid & mask, bool (b, h, w).

    mask: Mask bool (b, h, w) or (b, 1, h, w), True if the target has a value.
    """
    if mask is None:
        return valid
    if mask.dtype != torch.bool:
        raise UserError(f"{metric}: the mask must be bool, True at valid targets; it is {mask.dtype}.")
    mask = map_of(metric, "mask", mask)
    check_same_size(metric, mask, valid)
    return valid & mask.to(valid.device)


def probability(metric: str, pred: Tensor, scores: str) -> Tensor:
    """Return P(positive), fp64 (b, h, w).

    Args:
        metric: Name of the metric.
        pred: Scores (b, h, w) or (b, 1, h, w), or (b, 2, h, w) of negative and positive.
        scores: "logits" (sigmoid of one, softmax of two) or "probabilities".

    Raises:
        UserError: If a probability is outside of [0, 1], or the scores are NaN, integers or of another shape.
    """
    if not pred.is_floating_point():
        raise UserError(f"{metric}: thresholds need scores, not a map of {pred.dtype}; give the model's float output.")
    pred = to_fp64(require_numbers(metric, pred, infinite=True))
    two = pred.ndim == 4 and pred.shape[1] == 2
    if scores == "logits":
        return pred.softmax(1)[:, 1].contiguous() if two else map_of(metric, "prediction", pred).sigmoid()
    values = pred[:, 1].contiguous() if two else map_of(metric, "prediction", pred)
    if values.numel() and not 0 <= float(values.min()) <= float(values.max()) <= 1:
        low, high = float(values.min()), float(values.max())
        raise UserError(
            f"{metric}: probabilities range over [{low:.3g}, {high:.3g}]; if they are logits, use scores='logits'."
        )
    return values


def binary(metric: str, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return (positive, valid), bool (b, h, w), of a target of 1, 0 and `ignore_index`. Raise UserError for other values."""
    target = map_of(metric, "target", target)
    target = target.long() if not target.is_floating_point() else target
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    strange = target[valid & (target != 0) & (target != 1)]
    if strange.numel():
        raise UserError(
            f"{metric}: the target holds {strange[0].item():g}; it must be 0 or 1, or ignore_index ({ignore_index})."
        )
    return valid & (target == 1), valid


def check_thresholds(metric: str, thresholds: int) -> int:
    """Return `thresholds`. Raise UserError unless it is at least 1."""
    if thresholds < 1:
        raise UserError(f"{metric}: thresholds = {thresholds}; it must be at least 1.")
    return thresholds


def require_any(metric: str, count: Tensor, what: str, fix: str) -> int:
    """Return `count`. Raise UserError if it is 0."""
    if not int(count):
        raise UserError(f"{metric}: no {what} was counted; {fix}.")
    return int(count)
