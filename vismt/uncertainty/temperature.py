"""Temperature scaling: p = softmax(z / T), T with the smallest NLL on validation data (Guo et al., arXiv 1706.04599).

A softmax over the classes of several tasks has a temperature for each task's block of classes. The block b of the largest logit
is found first, and all logits are divided by its temperature:

    p = softmax(z / T_b),   b = block(argmax_c z_c),   T_b minimises  sum_{i: b_i = b} NLL_i(T) + 10 mean_i NLL_i(T)

The logits of an example are divided by one positive number, so no answer changes, neither within a block nor across blocks.
Tasks of different difficulty and size need different temperatures, and one T for all tasks would be their mean. The second
term, over all examples, weighs as much as ten examples. It keeps a block near the temperature of all if the block has few
answers, or only right answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.base.errors import UserError

COLDEST, HOTTEST = 1e-3, 1e3
_SHARED = 10  # weight of the mean over all examples in a block's temperature, in examples


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T with the smallest NLL. Calibrated probabilities are `softmax(logits / T)`.

    The NLL is convex in 1 / T, so its slope mean(E z - z_y) is bisected in fp64.

    Args:
        logits: Logits (n, k), float on any device, or log-probabilities of a Bayesian predictive.
        labels: Integers (n,) in [0, k).

    Returns:
        T in [0.001, 1000]. It is the lower end if every example is classified correctly, because the minimum then lies at T =
        0. It is the upper end if uniform probabilities are better than the logits at any T.

    Raises:
        UserError: If shapes do not fit, labels are out of range, or logits are not finite.
    """
    return float(_fit(*_checked(logits, labels), torch.ones(1, len(labels), dtype=torch.float64)))


def fit_block_temperatures(logits: Tensor, labels: Tensor, block_of_class: Tensor) -> list[float]:
    """Return the temperature of each block of classes. Calibrated probabilities are `softmax(block_tempered(...))`.

    Args:
        logits: Logits (n, k), float on any device.
        labels: Integers (n,) in [0, k).
        block_of_class: Number of each class's block, int (k,), from 0 to the last without a gap.

    Returns:
        Temperatures in [0.001, 1000], by block. A single block has the temperature of `fit_temperature`.

    Raises:
        UserError: As `fit_temperature`.
    """
    z, y = _checked(logits, labels)
    answered = block_of_class[z.argmax(1)]
    weights = [(answered == block).double() + _SHARED / len(y) for block in range(int(block_of_class.max()) + 1)]
    return _fit(z, y, torch.stack(weights)).tolist()


def block_tempered(logits: Tensor, temperature_of_class: Tensor) -> Tensor:
    """Return logits (n, k), each row divided by the temperature of its largest logit's class. temperature_of_class: (k,)."""
    return logits / temperature_of_class[logits.argmax(1)][:, None]


def _fit(z: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return the temperatures (b,) with the smallest NLL under each row of weights (b, n)."""
    chosen = z.gather(1, y[:, None]).squeeze(1)
    low = torch.full((len(weights),), -math.log(HOTTEST), dtype=torch.float64)  # bounds of log(1 / T)
    high = torch.full_like(low, -math.log(COLDEST))
    for _ in range(60):
        middle = (low + high) / 2
        slopes = [
            row @ ((torch.softmax(z * scale, 1) * z).sum(1) - chosen)
            for row, scale in zip(weights, middle.exp(), strict=True)
        ]
        rises = torch.stack(slopes) > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return (-(low + high) / 2).exp()


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits fp64 (n, k) and labels int64 (n,) on the CPU."""
    if logits.ndim != 2 or not len(logits) or labels.shape != (len(logits),):
        raise UserError(
            f"temperature: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: needed (n, k) and (n,)."
        )
    z, y = logits.detach().cpu().double(), labels.detach().cpu().long()
    if not bool(z.isfinite().all()):
        raise UserError(
            "temperature: logits are not all finite; take log-probabilities of a predictive that is never 0."
        )
    if not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
        raise UserError(
            f"temperature: labels range over [{int(y.min())}, {int(y.max())}], needed [0, {z.shape[1] - 1}]."
        )
    return z, y
