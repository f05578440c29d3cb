"""Proper scores of class probabilities, one value for each example: their expectation is smallest for the true probabilities.

    NLL = -log p_y                 Brier = sum_c (p_c - [y = c])^2 = sum_c p_c^2 - 2 p_y + 1, in [0, 2]

Good, J. R. Stat. Soc. B 14, 1952; Brier, Monthly Weather Review 78, 1950.
"""

from __future__ import annotations

from torch import Tensor


def proper_scores(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the NLL in nats and the Brier score, each (n,), of log-probabilities (n, k) and labels int64 (n,)."""
    chosen = log_p.gather(1, labels[:, None]).squeeze(1)
    briers = log_p.exp().square().sum(1) - 2 * chosen.exp() + 1
    return (-chosen).clamp_min(0), briers.clamp(0, 2)
