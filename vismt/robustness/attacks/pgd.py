"""Projected gradient descent on the cross-entropy, and its single step FGSM.

    x <- project(x + steepest step along the gradient),    from a random start in the ball

Madry et al., arXiv 1706.06083; Goodfellow et al., arXiv 1412.6572 (FGSM, from the image itself). The step is a multiple of
epsilon: 2.5 epsilon / steps reaches the boundary from any start, epsilon / 10 of the few-shot papers hardly does in 10 steps.
An image counts as broken at the first iterate that is wrong.
"""

from __future__ import annotations

import torch

from vismt.robustness.attacks.active_set import Wave, select
from vismt.robustness.attacks.losses import cross_entropy
from vismt.robustness.attacks.norms import project, random_start, steepest
from vismt.robustness.attacks.victim import Victim


def pgd(victim: Victim, wave: Wave, *, epsilon: float, norm: str, step: float, steps: int, start: bool) -> None:
    """Run `steps` steps of size `step`; start: from a random point, else from the image."""
    images = random_start(wave.clean, epsilon, norm, wave.seeds, edge=False) if start else wave.clean.clone()
    for _ in range(steps):
        logits, _, gradient = victim.gradient(images, wave.rows, wave.labels, None, cross_entropy)
        images, gradient = select(wave.settle(images, logits), images, gradient)
        if not len(wave):
            return
        images = project(wave.clean, images + steepest(gradient, images, step, norm), epsilon, norm)
    with torch.no_grad():
        logits = victim.logits(images, wave.rows)
    images, logits = select(wave.settle(images, logits), images, logits)
    wave.finish(images, logits)
