"""The weights that the routers of a trained net give to their experts on the patches of images, as arrays for a picture."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.contexts import evaluating
from vismt.lowrank.files.description import read_description
from vismt.lowrank.layers.base import adapter_modules
from vismt.multitask.emtal.ffn import MoEfiedMlp
from vismt.multitask.emtal.routing import expert_weights

MAPPED_BLOCKS = 3


def has_routers(adapter: Path) -> bool:
    """Return whether the adapter in a folder has routers."""
    return any(issubclass(spec.layer, MoEfiedMlp) for spec in read_description(adapter)[1])


def router_maps(net: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Return the experts' weights on the patches of images at fade 0, for a net at any fade.

    The tokens are computed at the net's fade, in the first, the middle and the last FFN with a router, without class and
    register tokens.

    Args:
        net: Unmerged net with a timm model as `stock` and a `backbone`.
        images: Images float (n, 3, h, w) in [0, 1].

    Returns:
        Arrays by name. omega: float16 (block, n, e, rows, columns). blocks: int64, the index of each block in the model. depth:
        the number of the model's blocks.

    Raises:
        UserError: If the net has no router.
    """
    routed = [(name, part) for name, part in adapter_modules(net).items() if isinstance(part, MoEfiedMlp)]
    if not routed:
        raise UserError("routers: this net has no router; take one that was adapted with emtal and is not merged.")
    places = sorted({round(i * (len(routed) - 1) / (MAPPED_BLOCKS - 1)) for i in range(MAPPED_BLOCKS)})
    chosen = [routed[place] for place in places]
    weights: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(net), ExitStack() as stack:
        for name, part in chosen:
            stack.callback(part.register_forward_pre_hook(partial(_weigh, weights, name)).remove)
        net(images.to(next(net.parameters()).device))
    rows, columns = net.backbone.grid
    patches = [weights[name][:, net.stock.num_prefix_tokens :] for name, _ in chosen]
    maps = [rearrange(omega, "b (r c) e -> b e r c", r=rows, c=columns) for omega in patches]
    return {
        "omega": torch.stack(maps).to("cpu", torch.float16).numpy(),
        "blocks": np.array([_block(name) for name, _ in chosen], dtype=np.int64),
        "depth": np.array(net.backbone.depth, dtype=np.int64),
    }


def _block(path: str) -> int:
    match = re.search(r"blocks\.(\d+)", path)
    if match is None:
        raise UserError(f"routers: '{path}' is not in a block of the model.")
    return int(match[1])


def _weigh(weights: dict[str, Tensor], name: str, part: MoEfiedMlp, inputs: tuple[Tensor]) -> None:
    router = part.lora_router
    weights[name] = expert_weights(router(inputs[0].to(router.weight.dtype)) / part.temperature, 0.0)
