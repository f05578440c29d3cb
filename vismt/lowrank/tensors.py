"""Checks of tensors that come from a file or go into one, and tensors that are spread over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fits(value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether every value is finite, also after a cast to `dtype` if it is given.

    Whole numbers and tensors on the meta device always pass.
    """
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point() or value.is_meta or not value.numel():
        return True
    if value.dtype not in FLOATING:  # 8 bits
        value = value.float()
    # This makes no mask of the tensor's size. aminmax passes NaN on.
    least, most = value.detach().aminmax()
    limit = torch.finfo(dtype if dtype is not None and dtype.is_floating_point else value.dtype).max
    return bool(-limit <= least) and bool(most <= limit)


def check_factor(name: str, value: Tensor) -> None:
    """Raise UserError unless a tensor of a file is floating and finite.

    name: Start of the message.
    """
    if value.dtype not in FLOATING:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise UserError(f"{name}: saved as {str(value.dtype).removeprefix('torch.')}; it must be one of {known}.")
    check_finite(name, value)


def check_finite(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise UserError unless every value of a tensor of a file is finite, also after a cast to `dtype` if it is given."""
    if not fits(value, dtype):
        held = f"values beyond the range of {dtype}" if fits(value) else "NaN or infinite values"
        raise UserError(f"{name}: it holds {held}; save a finite adapter.")


def check_parameter(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise UserError for a whole parameter of another kind than the model's, and for values beyond its dtype."""
    if (value.is_floating_point(), value.is_complex()) != (parameter.is_floating_point(), parameter.is_complex()):
        raise UserError(f"{name}: saved as {value.dtype}, the model's is {parameter.dtype}.")
    check_finite(name, value, parameter.dtype)


def need_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for `what` (a function with the option `force`) unless all tensors are finite."""
    for name, value in tensors.items():
        if not fits(value):
            raise UserError(f"{what}: '{name}' holds NaN or infinite values; train again, or pass force=True to go on.")


# ---- DTensors of FSDP2
def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, which call this together. Return any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(value: Tensor, like: Any) -> Tensor:
    """Return `value`, which is equal on all processes, sharded like `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    spread = DTensor.from_local(value.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return spread.redistribute(placements=like.placements)


@torch.no_grad()
def write_whole(target: Tensor, value: Tensor) -> None:
    """Copy the changed result of `whole(target)` into a sharded target. Other targets were changed in place."""
    if hasattr(target, "full_tensor"):
        target.copy_(part_like(value, target))
