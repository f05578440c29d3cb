"""A tiny ViT adapted with any registered method, at values as after some training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import vismt
from helpers.tiny import images, shake, tiny_vit
from vismt.llm import collect_covariance
from vismt.methods import METHODS

# What a method needs beside a rank. A new method is covered by being registered.
OPTIONS: dict[str, dict[str, Any]] = {
    "emtal": {"n_experts": 4, "cluster": False},
    "s2ft": {"ratio": 0.25, "parts": ["v", "o", "u", "d"]},
    "ilora": {"n_experts": 2, "user_width": 6},
    "lisa": {"active": 1},
    "mtlora": {"tasks": ["depth", "edge"]},
}
LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def small_vit() -> nn.Module:
    """Return a ViT of two blocks of width 16."""
    return tiny_vit(embed_dim=16, num_heads=2)


def adapted_vit(method: str, **more: object) -> nn.Module:
    """Return `small_vit`, adapted and changed."""
    model = small_vit()
    options = dict(OPTIONS.get(method, {}))
    if method == "corda":
        options = {"mode": "kpm", "covariances": collect_covariance(model, [images()], LAYERS)}
    rank = {} if "rank" in METHODS[method].unread else {"rank": 2}
    vismt.adapt(model, method, **rank, **options, **more)
    if method in ("lisa", "full"):  # only what changed is saved
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.add_(0.1)
        return model
    return shake(model)
