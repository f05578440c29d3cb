"""A convolution with a low-rank update.

y = W * x + b + s * (B C (A * x) - B0 (A0 * x))        A (r, c / groups * kernel), B (o, r) as a 1 x 1 convolution
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.low_rank import FORMS, LowRankLayer

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


@FORMS.register("conv2d")
@FORMS.register("nn.Conv1d")
@FORMS.register("nn.Conv3d")
class LowRankConv(LowRankLayer):
    """nn.Conv1d, Conv2d or Conv3d: A is a convolution of the same geometry with r output channels, B a 1x1 convolution.

    forward: x (b, c, ...) -> (b, o, ...). The matrix form is the weight reshaped to (o, c / groups * kernel); with groups
    each one has the same A on its channels, and its own rows of B.
    """

    groups: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        for name in GEOMETRY:
            setattr(self, name, getattr(base, name))

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shell._conv_forward(x, self.weight, self.bias)
        inner = F.dropout(x, self.dropout) if self.dropout and self.training else x
        out = out + self.scale * self._product(inner, self.lora_A, self.left(), self.gate(inner))
        if self.lora_A0 is not None:
            out = out - self.scale * self._product(x, self.lora_A0, self.lora_B0)
        return out

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A (r, c, ...) and B (o, r, 1, ...)."""
        if self.groups > 1 or set(self.dilation) != {1} or self.padding_mode != "zeros":
            raise UserError(
                "export_peft: peft's LoRA of a convolution has no dilation, no padding mode and another form for groups; merge "
                "the model and save it whole."
            )
        A, B = super().peft_factors(update)
        return A.view(-1, *self.weight.shape[1:]), self._pointwise(B)

    def _product(self, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None = None) -> Tensor:
        kernel = A.to(self.weight.dtype).view(-1, *self.weight.shape[1:])
        hidden = self.shell._conv_forward(x, repeat(kernel, "r ... -> (g r) ...", g=self.groups), None)
        if gate is not None:
            hidden = hidden * self._pointwise(gate.repeat(1, self.groups))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(hidden, self._pointwise(B.to(self.weight.dtype)), groups=self.groups)

    def _pointwise(self, matrix: Tensor) -> Tensor:
        """Return a matrix with an axis of length one for each axis of the kernel."""
        return matrix.reshape(*matrix.shape, *(1 for _ in self.kernel_size))
