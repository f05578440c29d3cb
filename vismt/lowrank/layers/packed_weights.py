"""Weights in the packed formats of bitsandbytes and torchao, which only the forward of their module reads as numbers.

A bitsandbytes weight is a Parameter of bytes with its scales beside it (4 bits: `quant_state`; 8 bits: one scale a row, in the
state of the module once that has run), a torchao weight a tensor subclass that shows the shape and dtype of the numbers.

On a CPU with AVX512-BF16 the first forward of a 4-bit module in eval mode on an input without gradient converts its weight for
a kernel in bfloat16: other bytes, scales rounded to bfloat16, and no backward from then on.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

from torch import Tensor, nn

LIBRARIES = ("bitsandbytes", "torchao")


def is_packed(weight: object) -> bool:
    """Return whether a parameter is in a packed format."""
    return type(weight).__module__.partition(".")[0] in LIBRARIES


def packing(module: nn.Module) -> str | None:
    """Return the format of a linear's weight, "bitsandbytes Params4bit"; None for a plain weight."""
    weight = getattr(module, "weight", None)
    return f"{type(weight).__module__.partition('.')[0]} {type(weight).__name__}" if is_packed(weight) else None


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a module as numbers: itself, or the numbers (o, i) that a packed one stands for."""
    weight: Any = module.weight
    name = packing(module)
    if name is None:
        return weight.detach()
    if name.startswith("torchao"):
        return weight.detach().dequantize()
    if getattr(weight, "quant_state", None) is not None:
        return _bitsandbytes().dequantize_4bit(*_as_packed(weight))
    if weight.is_floating_point():  # bitsandbytes packs it when it is moved to a device
        return weight.detach()
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # the first call moves them
    return weight.data.float() * scales.view(-1, 1) / 127


def use_cpu_kernel(model: nn.Module, allowed: bool) -> None:
    """Let the 4-bit modules of bitsandbytes use their CPU kernel without a backward, or keep them from it for training."""
    module: Any
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = allowed and _bitsandbytes().has_avx512bf16()
        if not allowed and getattr(module.weight, "quant_state", None) is not None:
            module.weight.data, module.weight.quant_state = _as_packed(module.weight)


def _as_packed(weight: Any) -> tuple[Tensor, Any]:
    """Return the bytes and scales of a 4-bit weight as they were packed; after a conversion the scales are the rounded ones."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    state = copy.copy(state)
    state.original_nested = False  # else the scales are quantised again, with another offset
    data, state = _bitsandbytes()._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    return data, state


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes").functional
