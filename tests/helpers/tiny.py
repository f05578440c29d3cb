"""A small timm ViT for tests, with copies of what was built before; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vismt.testing.method_contract import images, shake, small_vit

__all__ = ["DIGITS", "built_once", "holds", "images", "shake", "snapshot", "tiny_vit"]

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
    key = repr((build, seed, args, options, torch.get_default_dtype(), torch.empty(0).device))
    if key not in BUILT:
        torch.manual_seed(seed)
        BUILT[key] = build(*args, **options).eval(), torch.get_rng_state()
    model, state = BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def tiny_vit(seed: int = 0, num_classes: int = 5, **options: object) -> nn.Module:
    """Return a copy of `small_vit`: 2 blocks of width 32, for images of 16 x 16 pixels with 4 x 4 patches."""
    return built_once(small_vit, seed, seed, num_classes, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def holds(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether the state dict of a model has the names of `state`, in order, and all of its bits."""
    own = model.state_dict()
    return list(own) == list(state) and all(torch.equal(own[name], value) for name, value in state.items())
