"""What the metrics ask of their inputs; each function takes the metric's name for its errors."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vismt.errors import UserError, near


def plane(metric: str, what: str, values: Tensor) -> Tensor:
    """(b, h, w) from (b, h, w) or (b, 1, h, w), any dtype; UserError for another shape."""
    if values.ndim == 4 and values.shape[1] == 1:
        return rearrange(values, "b 1 h w -> b h w")
    if values.ndim != 3:
        raise UserError(f"{metric}: the {what} must be (b, h, w) or (b, 1, h, w), is {tuple(values.shape)}.")
    return values


def same_size(metric: str, pred: Tensor, target: Tensor, what: str = "target") -> None:
    """UserError unless pred and target, both (b, ..., h, w), have one batch, height and width."""
    (height, width), (wanted_height, wanted_width) = pred.shape[-2:], target.shape[-2:]
    if (height, width) != (wanted_height, wanted_width):
        raise UserError(
            f"{metric}: the prediction is {height} x {width} pixels, the {what} {wanted_height} x {wanted_width}: resize the "
            f"prediction to the {what}'s size (bilinear, before any argmax), never the {what}."
        )
    if len(pred) != len(target):
        raise UserError(
            f"{metric}: {len(pred)} predictions, but {len(target)} of the {what}: give both of the same images."
        )


def exact(values: Tensor) -> Tensor:
    """fp64 where the values lie, or on the CPU from an MPS device, which has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def sound(metric: str, pred: Tensor, infinite: bool = False) -> Tensor:
    """pred; UserError for NaN in it, and for infinite values unless allowed, as in logits that rule a class out."""
    broken = int((pred.isnan() if infinite else ~pred.isfinite()).sum())
    if broken:
        kind = "NaN" if infinite else "NaN or infinite"
        raise UserError(f"{metric}: {broken} predicted values are {kind}: the model has diverged, or divides by zero.")
    return pred


def masked(metric: str, valid: Tensor, mask: Tensor | None) -> Tensor:
    """Valid & mask, bool (b, h, w); mask: bool (b, h, w) or (b, 1, h, w), True where the target holds a value."""
    if mask is None:
        return valid
    if mask.dtype != torch.bool:
        raise UserError(f"{metric}: the mask must be bool, True where the target is valid; it is {mask.dtype}.")
    mask = plane(metric, "mask", mask)
    same_size(metric, mask, valid)
    return valid & mask.to(valid.device)


def probability(metric: str, pred: Tensor, scores: str) -> Tensor:
    """P(positive) fp64 (b, h, w). pred: (b, h, w) or (b, 1, h, w) of one score, or (b, 2, h, w) of negative and positive.

    scores: "logits" (sigmoid, softmax over the two) or "probabilities"; UserError for one outside [0, 1].
    """
    if not pred.is_floating_point():
        raise UserError(
            f"{metric}: needs scores to put thresholds on, not a map of {pred.dtype}: give the model's float output."
        )
    pred = exact(sound(metric, pred, infinite=True))
    two = pred.ndim == 4 and pred.shape[1] == 2
    if scores == "logits":
        return pred.softmax(1)[:, 1].contiguous() if two else plane(metric, "prediction", pred).sigmoid()
    found = pred[:, 1].contiguous() if two else plane(metric, "prediction", pred)
    if found.numel() and not 0 <= float(found.min()) <= float(found.max()) <= 1:
        low, high = float(found.min()), float(found.max())
        raise UserError(
            f"{metric}: probabilities range over [{low:.3g}, {high:.3g}]: are they logits? Then scores='logits'."
        )
    return found


def binary(metric: str, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(positive, valid), bool (b, h, w), of a target with 1 and 0 and `ignore_index`; UserError for any other value."""
    target = plane(metric, "target", target)
    target = target.long() if not target.is_floating_point() else target
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    strange = target[valid & (target != 0) & (target != 1)]
    if strange.numel():
        raise UserError(
            f"{metric}: the target holds {strange[0].item():g}: it must be 0 or 1, or ignore_index ({ignore_index})."
        )
    return valid & (target == 1), valid


def threshold_count(metric: str, thresholds: int) -> int:
    """thresholds; UserError unless there is at least one."""
    if thresholds < 1:
        raise UserError(f"{metric}: thresholds = {thresholds}: at least 1.")
    return thresholds


def one_of(metric: str, option: str, value: str, known: tuple[str, ...]) -> str:
    """value; UserError with the near name unless it is one of `known`."""
    if value not in known:
        raise UserError(f"{metric}: {option} '{value}' is not known.{near(value, known)}")
    return value


def seen(metric: str, count: Tensor, what: str, fix: str) -> int:
    """count; UserError when there is nothing to compute from."""
    if not int(count):
        raise UserError(f"{metric}: no {what} was seen: {fix}.")
    return int(count)
