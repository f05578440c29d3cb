"""A low-rank update beside a weight that only its own module can read: bitsandbytes 4 and 8 bits, torchao.

    y = linear(x) + s * (B C A x - B0 A0 x)        linear: the stock module with its packed weight

The update is that of vismt.lowrank.layers.linear; the fused function is not used, since it reads the weight itself. A start
from the weight takes the numbers that the packed weight stands for, and is subtracted here, so the packed weight stays as it
is. It is exported as a plain LoRA, and not merged: packing the sum again would round most of the update away.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import inner_module
from vismt.lowrank.layers.low_rank import FORMS, LowRankLayer
from vismt.lowrank.layers.packed_weights import dense_weight, packing


@FORMS.register("packed")
class LowRankPacked(LowRankLayer):
    """A linear on a packed weight. forward: x (..., i) -> (..., o), in the dtype that the stock module returns."""

    inner: nn.Module

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        self.__dict__["inner"] = inner_module(base)

    def linked(self) -> nn.Module:
        """Return the stock module on the present weight and bias, which conversions may have replaced."""
        present: dict[str, Any] = {"weight": self.weight, "bias": self.bias}
        self.inner._parameters.update(present)
        return self.inner

    def stock_weight(self) -> Tensor:
        return dense_weight(self.linked())

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    def check_mergeable(self, what: str, path: str) -> None:
        super().check_mergeable(what, path)
        if what != "merge":  # the pair of factors is that of any base
            return
        raise UserError(
            f"{what}: '{path}' has a packed weight ({packing(self)}), which would round the update away; load the model in a "
            "floating dtype and the adapter on it with on_other_base='warn', and merge there."
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.linked()(x)
        flat = x.reshape(-1, x.shape[-1])
        dropped = F.dropout(flat, self.dropout) if self.dropout and self.training else flat
        update = self.added(dropped, self.lora_A, self.left(), self.gate(x))
        if self.lora_A0 is not None:
            update = update - self.added(flat, self.lora_A0, self.lora_B0)
        return out + (self.scale * update).view(out.shape).to(out.dtype)
