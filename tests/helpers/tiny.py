"""A small timm ViT for tests, images for it, and changes of a model's parameters; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

# A multi-task run on digits without its adapt section.
DIGITS = {
    "task": "multitask",
    "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
    "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.03, "limit": 20}],
    "batch": 16,
    "train": {"steps": 2},
    "evaluate": {"batch": 64},
}


BUILT: dict[str, tuple[nn.Module, Tensor]] = {}


def built_once(build: Callable[..., nn.Module], seed: int, *args: object, **options: object) -> nn.Module:
    """Return a copy of what `build` makes with the random state of `seed`, and leave the random state that it left."""
    key = repr((build, seed, args, options, torch.get_default_dtype(), torch.get_default_device()))
    if key not in BUILT:
        torch.manual_seed(seed)
        BUILT[key] = build(*args, **options).eval(), torch.get_rng_state()
    model, state = BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def tiny_vit(seed: int = 0, num_classes: int = 5, **options: object) -> nn.Module:
    """Return a timm ViT with 2 blocks of width 32, for images of 16 x 16 pixels with 4 x 4 patches."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": num_classes}
    return built_once(timm.create_model, seed, "vit_tiny_patch16_224", **{**shape, **options})


def images(count: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    """Return random images, float32 (count, 3, size, size) in [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module, scale: float = 0.05, seed: int = 2) -> nn.Module:
    """Add noise to every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(scale * noise.to(parameter))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}
