"""Attacks on classifiers and dense nets. All have one threat model and one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.robustness.attacks.attacks import AttackSpec as AttackSpec
    from vismt.robustness.attacks.attacks import attack as attack
    from vismt.robustness.attacks.attacks import robust_accuracy as robust_accuracy
    from vismt.robustness.attacks.foreign import ATTACKS as ATTACKS

__getattr__, __dir__ = exports(__name__)
