"""A short ViT and a tiny Swin, Hiera and DINOv3 under names of timm, for configurations; test_* are timm's own."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import (
    Hiera,
    SwinTransformer,
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import nn

ABOUT = {
    "input_size": (3, 64, 64),
    "fixed_input_size": True,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
}
default_cfgs = generate_default_cfgs(
    {
        "tiny_swin.untrained": ABOUT,
        "tiny_hiera.untrained": ABOUT,
        "short_vit.untrained": {**ABOUT, "fixed_input_size": False, "classifier": "head"},
    }
)


@register_model
def tiny_swin(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return four stages of one or two blocks with windows of 2 x 2 patches, for images of 64 x 64 pixels."""
    shape = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
    return build_model_with_cfg(SwinTransformer, "tiny_swin", pretrained, **{**shape, "drop_path_rate": 0.0, **options})


@register_model
def tiny_hiera(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return four stages of one block, for images of 64 x 64 pixels."""
    shape = {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
    return build_model_with_cfg(Hiera, "tiny_hiera", pretrained, **{**shape, **options})


@register_model
def tiny_dinov3(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return four blocks of width 48 on patches of 16 x 16 pixels, with four register tokens and rotary positions."""
    shape = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    return timm.create_model("vit_small_patch16_dinov3", pretrained=pretrained, **{**shape, **options})


@register_model
def short_vit(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return two blocks of timm's test_vit, which has six."""
    shape = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 3,
        "dynamic_img_size": True,
    }
    return build_model_with_cfg(VisionTransformer, "short_vit", pretrained, **{**shape, **options})
