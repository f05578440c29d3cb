"""Stock modules as the core sees them: which modules can carry an update, the matrix (o, i) of each, and its numbers.

A weight may be prequantized, which means in a format of bitsandbytes or torchao that only the forward of its module reads as
numbers. A bitsandbytes weight is a Parameter of bytes with its scales beside it. (4 bits: `quant_state`. 8 bits: one scale a
row, in the state of the module once that has run.) A torchao weight is a tensor subclass that shows the shape and dtype of the
numbers.

On a CPU with AVX512-BF16, the first forward of a 4-bit module in eval mode on an input without gradient converts its weight for
a kernel in bfloat16. The weight then has other bytes, scales rounded to bfloat16, and no backward.
"""

from __future__ import annotations

import copy
import importlib
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from vismt.lowrank.layers.parameter_modules import ParameterModule

# Kinds of modules that can carry an update, with class and stock forward. transformers' Conv1D ("conv1d") is a further kind.
STOCK_KINDS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv2d": nn.Conv2d,
    "nn.Conv1d": nn.Conv1d,
    "nn.Conv3d": nn.Conv3d,
    "embedding": nn.Embedding,
    "parameter": ParameterModule,
}
LINEAR = ("linear", "conv1d")  # kinds that 'all-linear' takes
_LIBRARIES = ("bitsandbytes", "torchao")  # libraries of prequantized weights


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D. The check is by name, because transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def kind_of(module: nn.Module) -> str | None:
    """Return "conv1d" or one of STOCK_KINDS for a module that can carry an update, and None for another module."""
    if is_conv1d(module):
        return "conv1d"
    return next((kind for kind, cls in STOCK_KINDS.items() if isinstance(module, cls)), None)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape (o, i) of a linear, Conv1D or convolution, and (entries, width) of an embedding."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a prequantized weight has another shape
    if isinstance(module, ParameterModule):
        return module.matrix_shape()
    weight = cast(Tensor, module.weight)
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def is_prequantized(weight: object) -> bool:
    """Return whether a parameter is in a format of _LIBRARIES."""
    return type(weight).__module__.partition(".")[0] in _LIBRARIES


def weight_format(module: nn.Module) -> str | None:
    """Return the format of a prequantized weight of a module, "bitsandbytes Params4bit". A plain weight has None."""
    weight = getattr(module, "weight", None)
    if not is_prequantized(weight):
        return None
    return f"{type(weight).__module__.partition('.')[0]} {type(weight).__name__}"


def dense_weight(module: Any) -> Tensor:
    """Return the weight of a module as numbers. For a prequantized weight these are the numbers (o, i) that it stands for."""
    weight = module.weight
    name = weight_format(module)
    if name is None:
        return weight.detach()
    if name.startswith("torchao"):
        return weight.detach().dequantize()
    if getattr(weight, "quant_state", None) is not None:
        return _bitsandbytes().dequantize_4bit(*_as_packed(weight))
    if weight.is_floating_point():  # bitsandbytes packs the weight when it is moved to a device
        return weight.detach()
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # the first call moves the scales
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
    """Return the bytes and scales of a 4-bit weight as they were packed. After a conversion, the scales are the rounded ones."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    state = copy.copy(state)
    state.original_nested = False  # otherwise the scales are quantised again, with another offset
    data, state = _bitsandbytes()._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    return data, state


def _bitsandbytes() -> ModuleType:
    return importlib.import_module("bitsandbytes").functional
