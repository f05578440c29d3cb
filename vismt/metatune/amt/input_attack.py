"""The pyramid attack: a bounded change for each cell of several grids (Herrmann et al., arXiv 2111.15121).

    compose(x, d):  for each level l:  x <- clamp(x + m_l * nearest(d_l), lo, hi)
    T times:        d_l <- clamp(d_l + alpha * sign(dJ / dd_l), -eps, eps),    J = sum_q KL(p(x_q) || p(compose(x, d)_q))

The changes of coarse grids are multiplied. AMT (Yang, Liu, Wei, NeurIPS 2024) attacks its training queries with this attack.
Its grids have 4 and 8 cells a side and single pixels, with the multipliers 20, 10 and 1. One level (None, 1.0) is plain PGD on
the KL. With labels, J is the cross-entropy.

    released code                                 here
    fixes the grids for 128 pixels                the cells follow the size of the image
    applies no delta                              applies the deltas
    computes the target p(x) in every step        computes it once

The paper prints a cross-entropy with labels. Here the KL of the code is used, which needs no labels.

The l2 norm allows only the level of single pixels. With the gradient g, and norms of each image in pixel units (Madry et al.,
arXiv 1706.06083):    d <- P(d + alpha * g / ||g||_2),    P(d) = d * min(1, eps / ||d||_2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.base.norm_balls import column, size, steepest

Levels = Sequence[tuple[int | None, float]]

PYRAMID: Levels = ((4, 20.0), (8, 10.0), (None, 1.0))
PLAIN: Levels = ((None, 1.0),)
PYRAMID_NORMS = ("linf", "l2")
STARTS = ("uniform", "normal", "zero")
_SCALE = 1024.0  # factor of the objective: half precision must not flush its gradient to zero, whose size is not used


def pyramid_attack(
    logits_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int = 2,
    levels: Levels = PYRAMID,
    norm: str = "linf",
    init: str = "uniform",
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
    clean_logits: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Perturb images so that the predictions move away from the predictions on the clean images.

    A pixel moves by at most epsilon times the sum of the multipliers (31 with the defaults) and stays in [0, 1]. With "l2" an
    image moves by at most epsilon in its l2 norm. No parameter gets a gradient.

    Args:
        logits_fn: Function from images to logits (m, k). The logits of a query must not depend on the other queries.
        images: Images, floating (m, c, h, w).
        epsilon: Bound of the change of every cell, in pixel units of [0, 1]. With "l2", bound of the change of the whole image.
            With 0 a copy of the images is returned.
        step_size: Step of every cell's change (with "l2", of the image's change), in pixel units.
        steps: Number of steps.
        levels: Pairs (cells a side, multiplier). None stands for a cell for each pixel.
        norm: "linf", or "l2" with the levels `PLAIN`.
        init: Start of the changes. "uniform" in +-epsilon (with "l2", a uniform length up to epsilon in a random direction),
            "normal" (0.001 N(0, 1) in the images' units), or "zero", for which the gradient of the KL is rounding noise.
        mean: Mean of each channel, if `images` are normalised. The budget is still in pixel units.
        std: Standard deviation of each channel, together with mean.
        generator: Source of the start, by default seeded with 0.
        clean_logits: `logits_fn(images)`, if the caller has them.
        labels: Integers (m,). With labels, the attack raises the cross-entropy in place of the KL.

    Returns:
        The perturbed images, detached, in the shape, dtype and device of `images`.

    Raises:
        UserError: If images, budget, a level or the start are out of range, or for mean without std.
    """
    _check(images, epsilon, step_size, steps, levels, norm, init, mean, std)
    images = images.detach()
    if epsilon == 0:
        return images.clone()
    unit, low, high = _box(images, mean, std)
    bound = epsilon * unit
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    deltas = [_start(images, cells, bound, norm, init, generator) for cells, _ in levels]
    if clean_logits is None and labels is None:
        with torch.no_grad():
            clean_logits = logits_fn(images)
    target = None if clean_logits is None else F.log_softmax(clean_logits.detach().float(), dim=-1)
    for _ in range(steps):
        with torch.enable_grad():
            leaves = [delta.requires_grad_(True) for delta in deltas]
            log_p = F.log_softmax(logits_fn(_compose(images, leaves, levels, low, high)).float(), dim=-1)
            if labels is not None:
                gain = F.nll_loss(log_p, labels, reduction="sum")
            else:
                assert target is not None  # of the clean logits
                gain = F.kl_div(log_p, target, reduction="sum", log_target=True)
            gradients = torch.autograd.grad(_SCALE * gain, leaves)
        with torch.no_grad():
            deltas = [
                _bounded(delta + step_size * unit * _direction(unit * gradient, norm), bound, norm)
                for delta, gradient in zip(leaves, gradients)
            ]
    with torch.no_grad():
        return _compose(images, deltas, levels, low, high)


def _compose(images: Tensor, deltas: Sequence[Tensor], levels: Levels, low: Tensor, high: Tensor) -> Tensor:
    for delta, (_, multiplier) in zip(deltas, levels):
        spread = delta if delta.shape == images.shape else F.interpolate(delta, size=images.shape[-2:], mode="nearest")
        images = torch.clamp(images + multiplier * spread, low, high)
    return images


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of norm 1 in which J rises most, in the dtype of the gradient (m, c, h, w) per pixel unit."""
    return steepest(gradient.float(), gradient, 1.0, norm).to(gradient.dtype)


def _bounded(change: Tensor, bound: Tensor, norm: str) -> Tensor:
    """Return the nearest change within the budget. bound: Budget (1, c, 1, 1) in the images' units."""
    if norm == "linf":
        return torch.clamp(change, -bound, bound)
    length = size((change / bound).float(), norm).clamp_min(1)
    return change / column(length.to(change.dtype))


def _start(
    images: Tensor, cells: int | None, bound: Tensor, norm: str, init: str, generator: torch.Generator
) -> Tensor:
    """Draw a start (m, c, cells, cells), in fp32 on the generator's device, so that every device gets the same numbers."""
    shape = (*images.shape[:2], *(images.shape[-2:] if cells is None else (cells, cells)))
    if init == "zero":
        return images.new_zeros(shape)
    if init == "normal":
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return _bounded(0.001 * drawn.to(images), bound, norm)
    if norm == "l2":
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        length = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device)
        return bound * (length * _direction(drawn, norm)).to(images)
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return bound * (2 * drawn - 1).to(images)


def _box(images: Tensor, mean: object, std: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pixel unit, 0 and 1 in the images' units: (1, 1, 1, 1) or (1, c, 1, 1) each."""
    if mean is None:
        return images.new_ones(1, 1, 1, 1), images.new_zeros(1, 1, 1, 1), images.new_ones(1, 1, 1, 1)
    kind: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
    centre, spread = (torch.as_tensor(values, **kind).view(1, -1, 1, 1) for values in (mean, std))
    return 1 / spread, -centre / spread, (1 - centre) / spread


def _check(
    images: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    levels: Levels,
    norm: str,
    init: str,
    mean: object,
    std: object,
) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            f"pyramid attack: images are {images.dtype} {tuple(images.shape)}, needed floating (m, c, h, w)."
        )
    require_known("pyramid attack: norm", [norm], PYRAMID_NORMS)
    if norm == "l2" and tuple(map(tuple, levels)) != PLAIN:
        raise UserError(f"pyramid attack: levels {levels} with norm l2, which has only the level {PLAIN}.")
    fits = 0 <= epsilon < float("inf") and (epsilon <= 1 or norm == "l2")
    if not fits or not (step_size > 0 or epsilon == 0) or steps < 1:
        raise UserError(
            f"pyramid attack: epsilon {epsilon}, step_size {step_size}, steps {steps}: need 0 <= epsilon (<= 1 for linf) and "
            "step_size > 0 in pixel units of [0, 1] (8/255, not 8), and steps >= 1."
        )
    side = min(images.shape[-2:])
    if not levels or any((cells is not None and not 1 <= cells <= side) or factor <= 0 for cells, factor in levels):
        raise UserError(
            f"pyramid attack: levels {levels} on {images.shape[-2]} x {images.shape[-1]} images: give (cells a side, "
            "multiplier > 0) with cells from 1 to the smaller side, or None for a cell per pixel."
        )
    require_known("pyramid attack: init", [init], STARTS)
    if (mean is None) != (std is None):
        raise UserError("pyramid attack: give mean and std together, or neither for pixels in [0, 1].")
