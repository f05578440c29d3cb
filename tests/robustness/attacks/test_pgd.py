"""PGD against a textbook loop on all images at once, with the engine's starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.attack_parts import CLASSES, KEYS, seeds_of, survivors, victim_case, worst_iterates

from vismt.base.norm_balls import random_start
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.losses import margin


def textbook(spec, starts):
    """Return every iterate of PGD on the cross-entropy, written for linf and l2 alone."""
    net, clean, labels = victim_case()
    images, trajectory = starts, [starts]
    for _ in range(spec.steps):
        leaf = images.double().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), labels, reduction="sum"), leaf)
        gradient = gradient.float()
        if spec.norm == "linf":
            moved = images + spec.step * gradient.sign()
            images = clean + torch.clamp(moved - clean, -spec.epsilon, spec.epsilon)
        else:
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            change = images + spec.step * gradient / length - clean
            radius = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            images = clean + torch.where(radius > spec.epsilon, change * spec.epsilon / radius, change)
        images = images.clamp(0, 1)
        trajectory.append(images)
    return trajectory


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.07), ("l2", 0.95)])
@pytest.mark.parametrize("name", ["pgd", "pgd_paper", "fgsm"])
def test_pgd_is_the_textbook_loop_and_its_worst_iterate(name, norm, epsilon):
    net, clean, labels = victim_case()
    spec = AttackSpec(name, epsilon, norm=norm, seed=2, step_size=epsilon if name == "fgsm" else None)
    trajectories = []
    for restart in range(spec.restarts):
        seeds = seeds_of(spec, restart)
        starts = clean if name == "fgsm" else random_start(clean, epsilon, norm, seeds, edge=False)
        trajectories.append(textbook(spec, starts))
    full = spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS, exhaust=True)
    # Of the restarts, the one that ends furthest beyond the boundary.
    ends = torch.stack([trajectory[-1] for trajectory in trajectories])
    heights = torch.stack([margin(net(images.double()), labels) for images in ends])
    assert torch.allclose(full, ends[heights.argmax(0), torch.arange(len(clean))], atol=1e-5)
    expected = worst_iterates([images for trajectory in trajectories for images in trajectory])
    assert torch.equal(survivors(spec), expected) and 0 < expected.sum() < len(clean)
