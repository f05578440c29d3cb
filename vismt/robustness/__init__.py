"""Attacks, corruptions and the evaluation of any classifier under them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.robustness import attacks
    from vismt.robustness.attacks.attacks import AttackSpec, attack, robust_accuracy
    from vismt.robustness.attacks.dense_attack import DenseAttack
    from vismt.robustness.classifier import PixelClassifier, classifier_of, load_classifier, load_robustbench
    from vismt.robustness.conditions import AttackConfig, CorruptionConfig, Transfer, TransferSource
    from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec, corrupt
    from vismt.robustness.evaluate import ConditionAccuracy, evaluate_classifier, evaluate_examples
    from vismt.robustness.masking import check_masking
    from vismt.robustness.quantisation import quantise
    from vismt.robustness.smoothing import Smoothing

__all__ = [
    "CORRUPTIONS",
    "AttackConfig",
    "AttackSpec",
    "ConditionAccuracy",
    "CorruptionConfig",
    "CorruptionSpec",
    "DenseAttack",
    "PixelClassifier",
    "Smoothing",
    "Transfer",
    "TransferSource",
    "attack",
    "attacks",
    "check_masking",
    "classifier_of",
    "corrupt",
    "evaluate_classifier",
    "evaluate_examples",
    "load_classifier",
    "load_robustbench",
    "quantise",
    "robust_accuracy",
]

__getattr__, __dir__ = exports(__name__)
