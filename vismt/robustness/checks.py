"""Checks of an attack's input and output."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vismt.errors import UserError

TOLERANCE = 1e-6


class AttackBudget(Protocol):
    """The fields of an AttackSpec that the checks read."""

    @property
    def name(self) -> str: ...

    @property
    def epsilon(self) -> float: ...

    @property
    def norm(self) -> str: ...


def check_input(images: Tensor, labels: Tensor, spec: AttackBudget, num_classes: int) -> None:
    """Raise UserError unless the attack can run on images (b, 3, h, w) in [0, 1] with labels (b,) in 0..num_classes-1."""
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise UserError(
            f"attack {spec}: images {tuple(images.shape)}, labels {tuple(labels.shape)}: need (b, 3, h, w) and (b,)."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"attack {spec}: pixels run from {low:.4g} to {high:.4g}, need [0, 1]: the model must normalise, not the data."
        )
    if num_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(f"attack {spec}: labels {span} for {num_classes} classes: need 0 to {max(num_classes, 2) - 1}.")
    if spec.name == "apgd_t" and num_classes < 4:
        raise UserError(f"attack {spec}: its targeted loss needs 4 classes, here are {num_classes}: take apgd_ce.")
    if spec.norm == "l2" and spec.name in ("square", "autoattack") and not _tiles(*images.shape[-2:]):
        side = f"{images.shape[-2]} x {images.shape[-1]}"
        raise UserError(
            f"attack {spec}: l2 Square cannot tile {side} pixels: resize to a square of side 5, 10, 15, ..."
        )


def _tiles(height: int, width: int) -> bool:
    """Return whether l2 Square can start: a square image that contains its tiles, a fifth of the side, from a centred margin."""
    tile = height // 5
    margin = (height - 5 * tile) // 2
    return height == width and (tile == 1 or (tile > 1 and margin + height // tile * tile <= height))


def within_budget(clean: Tensor, adversarial: Tensor, spec: AttackBudget) -> Tensor:
    """Return `adversarial`, clamped to [0, 1] within the tolerance.

    Raises RuntimeError when an image leaves its budget or [0, 1] or is not finite: a fault of the attack, not the user's.
    """
    change = (adversarial - clean).flatten(1)
    size = change.abs().amax(1) if spec.norm == "linf" else change.norm(dim=1)
    worst, low, high = float(size.max()), float(adversarial.min()), float(adversarial.max())
    # Written so that a NaN fails it.
    if not (worst <= spec.epsilon + TOLERANCE * max(1.0, spec.epsilon) and low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise RuntimeError(
            f"attack {spec}: left its budget: {spec.norm} {worst:.8g} > {spec.epsilon:.8g}, or pixels {low}..{high}"
        )
    return adversarial.clamp(0, 1)
