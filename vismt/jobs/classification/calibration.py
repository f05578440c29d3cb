"""What is fitted on the validation images of a training: the temperature of its probabilities, and tau of its class prior.

    p = softmax(z / T), one T for all tasks, with the smallest NLL            (vismt/uncertainty/temperature.py)
    z - tau log pi, tau of TAUS with the best mean accuracy over the tasks    (vismt/multitask/class_loss.py)

calibration.json in the training's folder has both; a report that is written again does not fit again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vismt.jobs.output_conditions import TAUS, kept
from vismt.multitask.class_loss import adjusted
from vismt.uncertainty.temperature import fit_temperature

CALIBRATION = "calibration.json"
Outputs = list[tuple[Tensor, Tensor]]  # of each task: logits (n, C) and labels (n,)


@dataclass(frozen=True)
class Calibration:
    """What was fitted for weights with a fingerprint, on n images."""

    fingerprint: str
    temperature: float
    tau: float
    n: int


def calibration(folder: Path, fingerprint: str, counts: Sequence[int], outputs: Callable[[], Outputs]) -> Calibration:
    """Return what calibration.json in `folder` has for these weights, or fit and write it.

    Args:
        folder: of the training.
        fingerprint: of the weights.
        counts: training images of each class of the union.
        outputs: returns the outputs on the validation images.
    """

    def fit() -> Calibration:
        tasks = outputs()
        logits, labels = (torch.cat(parts) for parts in zip(*tasks))
        return Calibration(fingerprint, fit_temperature(logits, labels), best_tau(tasks, counts), len(labels))

    return kept(folder / CALIBRATION, Calibration, fingerprint, fit)


def best_tau(tasks: Outputs, counts: Sequence[int]) -> float:
    """Return the tau with the largest mean accuracy over the tasks, the smallest of several."""

    def score(tau: float) -> float:
        right = [(adjusted(logits, counts, tau).argmax(1) == labels).double().mean() for logits, labels in tasks]
        return float(torch.stack(right).mean())

    return max(TAUS, key=score)
