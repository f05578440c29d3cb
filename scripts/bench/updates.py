"""Part of `python -m scripts.bench lowrank`: sums of adapters against peft's, and the landing field against its n x n form.

Sums: three LoRA adapters (r=16, random factors) on every linear of two blocks of a ViT-S, added by QR and a small SVD here,
by an SVD of each dense sum in peft (`add_weighted_adapter` with "svd"); both keep rank 16. Landing: the field of a factor
of n = 4096, r = 16, and the same value with the n x n skew matrix that PoLAR's released code builds, reimplemented here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.core import RANK
from scripts.bench.timing import Ratios, interleave
from vismt.llm.polar.stiefel import landing_field
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.combining import combine
from vismt.lowrank.model.targets import find_targets

SUM, PEFT_SUM, LANDING, SQUARE = "vismt svd", "peft svd", "vismt landing", "n x n form"
WEIGHTS, TALL, ATTRACTION = (0.5, 0.3, 0.2), 4096, 5e-3

Sum = Callable[[], dict[str, LowRank]]


def sums(peft: Any, rounds: int, device: torch.device) -> Ratios:
    """Time the sum of three adapters. peft: the package."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", depth=2, num_classes=0).to(device)
    vismt_sum, peft_sum = summed(peft, model, RANK)
    timing = interleave({SUM: vismt_sum, PEFT_SUM: peft_sum}, rounds, label="sums of adapters", device=device)
    return Ratios(f"three adapters of rank {RANK} on two blocks of a ViT-S", timing, [(SUM, PEFT_SUM, 0.1)])


def summed(peft: Any, model: nn.Module, rank: int) -> tuple[Sum, Sum]:
    """Return the sum of three random adapters of every linear, in vismt and in peft: a call that returns updates by path."""
    shapes = {path: tuple(module.weight.shape) for path, module in find_targets(model, None)[0].items()}
    device = next(model.parameters()).device
    names = [f"adapter {number}" for number in range(len(WEIGHTS))]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(shapes))
    net = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        net.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    adapters: dict[str, list[LowRank]] = {}
    for path, (out_features, in_features) in shapes.items():
        layer = net.base_model.model.get_submodule(path)
        for name in names:
            left = torch.randn(out_features, rank, generator=generator)
            right = torch.randn(rank, in_features, generator=generator)
            layer.lora_B[name].weight.data = left.to(device)
            layer.lora_A[name].weight.data = right.to(device)
            adapters.setdefault(path, []).append(LowRank(left.to(device), right.to(device)))

    def vismt_sum() -> dict[str, LowRank]:
        return {path: combine(factors, WEIGHTS, "svd", rank) for path, factors in adapters.items()}

    @torch.no_grad()
    def peft_sum() -> dict[str, LowRank]:
        net.add_weighted_adapter(names, list(WEIGHTS), "sum", combination_type="svd", svd_rank=rank)
        summed_factors = {}
        for path in adapters:
            layer = net.base_model.model.get_submodule(path)
            B, A = layer.lora_B["sum"].weight, layer.lora_A["sum"].weight
            summed_factors[path] = LowRank(B, A, scale=layer.scaling["sum"])
        net.delete_adapter("sum")
        return summed_factors

    return vismt_sum, peft_sum


def landing(rounds: int, device: torch.device) -> Ratios:
    """Time the landing field of a factor."""
    generator = torch.Generator().manual_seed(0)
    z = torch.linalg.qr(torch.randn(TALL, RANK, generator=generator))[0].to(device)
    gradient = torch.randn(TALL, RANK, generator=generator).to(device)
    calls = {LANDING: lambda: landing_field(z, gradient, ATTRACTION), SQUARE: lambda: by_square(z, gradient)}
    timing = interleave(calls, rounds, label="landing", device=device)
    return Ratios(f"landing field, n = {TALL}, r = {RANK}", timing, [(LANDING, SQUARE, 0.05)])


def by_square(z: Tensor, gradient: Tensor) -> Tensor:
    """Return the landing field, computed with its n x n matrix."""
    skew = gradient @ z.mT - z @ gradient.mT
    return skew @ z + ATTRACTION * z @ (z.mT @ z - torch.eye(z.shape[1], device=z.device))
