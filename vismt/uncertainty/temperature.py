"""Temperature scaling: p = softmax(z / T), T with the smallest NLL on validation data (Guo et al., arXiv 1706.04599)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.base.errors import UserError

COLDEST, HOTTEST = 1e-3, 1e3


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T with the smallest NLL; calibrated probabilities are `softmax(logits / T)`.

    The NLL is convex in 1 / T, so its slope mean(E z - z_y) is bisected in fp64.

    Args:
        logits: (n, k) float on any device, or log-probabilities of a Bayesian predictive.
        labels: (n,) int in [0, k).

    Returns:
        T in [0.001, 1000]: the lower end where every example is classified correctly, so that the minimum lies at T = 0; the
        upper end where uniform probabilities are better than the logits at any T.

    Raises:
        UserError: shapes that do not fit, labels out of range, or logits that are not finite.
    """
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
    chosen = z.gather(1, y[:, None]).squeeze(1)
    low, high = -math.log(HOTTEST), -math.log(COLDEST)  # bounds of log(1 / T)
    for _ in range(60):
        middle = (low + high) / 2
        share = torch.softmax(z * math.exp(middle), 1)
        slope = ((share * z).sum(1) - chosen).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
