"""Checks of an attack's input and output."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vismt.base.errors import UserError
from vismt.robustness.attacks.norms import TOLERANCE, rounding, size


class AttackBudget(Protocol):
    """The fields of an AttackSpec that the checks read."""

    @property
    def epsilon(self) -> float: ...

    @property
    def norm(self) -> str: ...


def check_input(images: Tensor, labels: Tensor, what: str, num_classes: int) -> None:
    """Raise UserError unless the attack can run on images (b, 3, h, w) in [0, 1] with labels (b,) in 0..num_classes-1."""
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise UserError(
            f"attack {what}: images {tuple(images.shape)}, labels {tuple(labels.shape)}: need (b, 3, h, w) and (b,)."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"attack {what}: pixels run from {low:.4g} to {high:.4g}, need [0, 1]: the model must normalise, not the data."
        )
    if num_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(f"attack {what}: labels {span} for {num_classes} classes: need 0 to {max(num_classes, 2) - 1}.")


def within_budget(clean: Tensor, adversarial: Tensor, spec: AttackBudget) -> Tensor:
    """Return `adversarial`, clamped to [0, 1] within the tolerance.

    Raises RuntimeError when an image leaves its budget or [0, 1] or is not finite: a fault of the attack, not the user's.
    """
    worst, low, high = (
        float(size(adversarial - clean, spec.norm).max()),
        float(adversarial.min()),
        float(adversarial.max()),
    )
    allowed = spec.epsilon + rounding(clean, spec.epsilon, spec.norm)
    # Written so that a NaN fails it.
    if not (worst <= allowed and low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise RuntimeError(
            f"attack {spec}: left its budget: {spec.norm} {worst:.8g} > {spec.epsilon:.8g}, or pixels {low}..{high}"
        )
    return adversarial.clamp(0, 1)
