"""Weights in the packed formats of bitsandbytes and torchao, which only the forward of their module reads as numbers.

A bitsandbytes weight is a Parameter of bytes with its scales beside it (4 bits: `quant_state`; 8 bits: one scale a row, in the
state of the module once that has run), a torchao weight a tensor subclass that shows the shape and dtype of the numbers.
"""

from __future__ import annotations

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
        return importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    if weight.is_floating_point():  # bitsandbytes packs it when it is moved to a device
        return weight.detach()
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # the first call moves them
    return weight.data.float() * scales.view(-1, 1) / 127
