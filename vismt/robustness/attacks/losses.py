"""The losses of attacks: values (b,) that an attack raises, from logits z (b, k) in float64 and labels y (b,).

    cross_entropy   log sum_{j != y} exp(z_j) - z_y
    dlr             -(z_y - max_{j != y} z_j) / (z_(1) - z_(3))                      3 classes or more
    targeted_dlr    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)                     4 classes or more
    margin          z_t - z_y, with t the largest other logit if no target is given

z_(i) is the i-th largest logit (Croce and Hein, arXiv 2003.01690). The cross-entropy is softplus of the value given here. Both
have the same order and the same direction of the gradient, but the value given here does not vanish if softmax is saturated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# logits (b, k), labels (b,), targets (b,) or None -> (b,)
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
FLOOR = 1e-12


def _at(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None])[:, 0]


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits, with -inf for the label."""
    return logits.scatter(1, labels[:, None], float("-inf"))


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the inverse softplus of the cross-entropy of the labels."""
    return torch.logsumexp(_others(logits, labels), 1) - _at(logits, labels)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio."""
    ordered = logits.topk(3, 1).values
    gap = _others(logits, labels).amax(1) - _at(logits, labels)
    return gap / (ordered[:, 0] - ordered[:, 2] + FLOOR)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Return the difference of logits ratio towards the targets."""
    if targets is None:
        raise ValueError("targeted_dlr needs targets")
    ordered = logits.topk(4, 1).values
    gap = _at(logits, targets) - _at(logits, labels)
    return gap / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + FLOOR)


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the logit of the target, or of the strongest other class, minus the logit of the label."""
    other = _others(logits, labels).amax(1) if targets is None else _at(logits, targets)
    return other - _at(logits, labels)
