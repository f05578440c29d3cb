"""VBLL heads with known values of every parameter, and their explicit covariances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.llm import VBLLClassifier

COVARIANCES = ("diagonal", "dense", "lowrank")
LABELS = torch.tensor([0, 2, 1, 1, 0])


def wave(*shape: int, speed: float) -> Tensor:
    """Return sin(speed * 1, 2, ...) in fp64: reproducible numbers, also in other programs."""
    count = math.prod(shape)
    return torch.sin(speed * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def features() -> Tensor:
    """Return features fp64 (5, 6)."""
    return 2 * wave(5, 6, speed=0.7)


def moved_head(covariance: str, **options: object) -> VBLLClassifier:
    """Return an fp64 head of 3 classes on 6 features, N = 40, prior variance 1.5 * 2 / 6 = 0.5, with no start values left."""
    rank = {"covariance_rank": 2} if covariance == "lowrank" else {}
    settings = {"noise_dof": 2.0, "noise_scale": 0.7, **rank, **options}
    head = VBLLClassifier(6, 3, 40, covariance, 1.5, **settings).double()
    logs = 0.5 * wave(3, 6, speed=2.1) - 1
    with torch.no_grad():
        head.mean.copy_(wave(3, 6, speed=1.3))
        head.spread.log_std.copy_(logs / 2 if covariance == "lowrank" else logs)
        head.log_noise.copy_(wave(3, speed=0.9) - 1)
        if covariance == "dense":
            head.spread.lower.copy_(0.3 * wave(3, 6, 6, speed=1.1))
        if covariance == "lowrank":
            head.spread.factor.copy_(0.3 * wave(3, 6, 2, speed=1.1))
    return head


def covariances(head: VBLLClassifier) -> Tensor:
    """Return S (k, d, d), computed explicitly from the parameters."""
    spread = head.spread
    std = spread.log_std.detach().exp()
    if hasattr(spread, "lower"):
        lower = torch.stack([torch.tril(part, -1) + torch.diag(row) for part, row in zip(spread.lower.detach(), std)])
        return lower @ lower.mT
    plain = torch.diag_embed(std**2)
    return plain + spread.factor.detach() @ spread.factor.detach().mT if hasattr(spread, "factor") else plain
