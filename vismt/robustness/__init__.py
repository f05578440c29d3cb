"""Attacks and corruptions, and the evaluation of any classifier under them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.robustness import attacks as attacks
    from vismt.robustness.attacks.attacks import AttackSpec as AttackSpec
    from vismt.robustness.attacks.attacks import attack as attack
    from vismt.robustness.attacks.attacks import robust_accuracy as robust_accuracy
    from vismt.robustness.attacks.dense_attack import DenseAttack as DenseAttack
    from vismt.robustness.classifier import PixelClassifier as PixelClassifier
    from vismt.robustness.classifier import classifier_of as classifier_of
    from vismt.robustness.classifier import load_classifier as load_classifier
    from vismt.robustness.classifier import load_robustbench as load_robustbench
    from vismt.robustness.conditions import AttackConfig as AttackConfig
    from vismt.robustness.conditions import CorruptionConfig as CorruptionConfig
    from vismt.robustness.conditions import Transfer as Transfer
    from vismt.robustness.conditions import TransferSource as TransferSource
    from vismt.robustness.corruptions import CORRUPTIONS as CORRUPTIONS
    from vismt.robustness.corruptions import CorruptionSpec as CorruptionSpec
    from vismt.robustness.corruptions import corrupt as corrupt
    from vismt.robustness.evaluate import ConditionAccuracy as ConditionAccuracy
    from vismt.robustness.evaluate import evaluate_classifier as evaluate_classifier
    from vismt.robustness.evaluate import evaluate_examples as evaluate_examples
    from vismt.robustness.smoothing import Smoothing as Smoothing

__getattr__, __dir__ = exports(__name__)
