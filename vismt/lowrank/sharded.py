"""Tensors of which each process holds a part (DTensors of FSDP2), seen as whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, which call this together; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(value: Tensor, like: Any) -> Tensor:
    """Return `value`, equal on all processes, sharded as `like` is."""
    from torch.distributed.tensor import DTensor, Replicate

    spread = DTensor.from_local(value.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return spread.redistribute(placements=like.placements)


@torch.no_grad()
def write_whole(target: Tensor, value: Tensor) -> None:
    """Copy what `whole(target)` returned, changed since, into a sharded target; other targets were changed in place."""
    if hasattr(target, "full_tensor"):
        target.copy_(part_like(value, target))
