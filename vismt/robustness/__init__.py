"""Attacks, corruptions and the evaluation of any classifier under them."""

from vismt.robustness.attacks import AttackSpec, attack, robust_accuracy

__all__ = ["AttackSpec", "attack", "robust_accuracy"]
