"""The kinds of stock modules that can carry an update, and the matrix (o, i) that each is to an update."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vismt.lowrank.layers.parameters import HeldParameter

# Kinds of modules that can carry an update beside transformers' Conv1D ("conv1d"): class and stock forward.
KINDS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv2d": nn.Conv2d,
    "nn.Conv1d": nn.Conv1d,
    "nn.Conv3d": nn.Conv3d,
    "embedding": nn.Embedding,
    "parameter": HeldParameter,
}
LINEAR = ("linear", "conv1d")  # the kinds that 'all-linear' takes


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, by name: transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def kind_of(module: nn.Module) -> str | None:
    """Return "conv1d" or one of KINDS for a module that can carry an update, else None."""
    if is_conv1d(module):
        return "conv1d"
    return next((kind for kind, cls in KINDS.items() if isinstance(module, cls)), None)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (o, i) of a linear, Conv1D or convolution, (entries, width) of an embedding."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a packed weight has another shape
    weight = cast(Tensor, module.weight)
    if isinstance(module, HeldParameter):
        return module.matrix_shape()
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if is_conv1d(module) else (rows, columns)
