"""Attacks on classifiers and dense nets, one threat model and one call for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.robustness.attacks.attacks import AttackSpec, attack, robust_accuracy

__all__ = ["AttackSpec", "attack", "robust_accuracy"]

__getattr__, __dir__ = exports(__name__)
