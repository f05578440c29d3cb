"""A linear with a low-rank update: one fused forward and backward (fused.py), see low_rank.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.lowrank.layers.fused import FusedLowRank
from vismt.lowrank.layers.low_rank import FORMS, LowRankLayer


@FORMS.register("linear")
@FORMS.register("conv1d")
class LowRankLinear(LowRankLayer):
    """nn.Linear, or transformers' Conv1D (weight stored (i, o)), with a low-rank update.

    forward: x (..., i) -> (..., o), in x's dtype (the autocast dtype where autocast is on).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])
        weight = self.matrix(self.weight)
        if self.dropout and self.training:
            out = F.linear(flat, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            dropped = F.dropout(flat, self.dropout)
            out = out + self.scale * self.added(dropped, self.right(), self.left(), self.gate(x))
        else:
            factors = self.right(), self.left(), self.lora_A0, self.lora_B0
            # The bookkeeping of autograd takes longer than the products of one generated token.
            fused = FusedLowRank.apply if torch.is_grad_enabled() else FusedLowRank.forward
            out, _ = fused(flat, weight, self.bias, *factors, self.gate(x), self.scale, self.blocks)
        return out.view(*x.shape[:-1], out.shape[-1])
