"""Adapter layers on 4-bit values of W less the start of the update (QPiSSA): quantised by rule, W kept beside them.

    y = Q x + b + s B A x        Q = grid(W - s B0 A0), A0 and B0 the start as it is stored, grid of nf4.GRIDS

Q is a function of W, A0 and B0. An adapter file carries the start, so a layer on the original W computes the same Q again;
fp64 before the rounding keeps the order of a BLAS's sums from deciding which level is nearer. Q is a Parameter in the place
of W, in W's dtype; `remove_update` puts W back. Against W the update has no low rank: it is merged, not exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.init import working_dtype
from vismt.lowrank.layer_spec import LayerSpec
from vismt.lowrank.layers.base import register_layer
from vismt.lowrank.layers.conv import LowRankConv
from vismt.lowrank.layers.linear import LowRankLayer, LowRankLinear, LowRankSettings
from vismt.lowrank.model.targets import LINEAR
from vismt.lowrank.nf4 import GRIDS, on_grid
from vismt.lowrank.svd import double

MERGE = "against the original weights its update is not a pair of factors; merge the model and save it whole"


@dataclass(frozen=True)
class QuantizedSettings(LowRankSettings):
    """Settings of a low-rank update on a quantised weight. grid: one of nf4.GRIDS."""

    grid: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid not in GRIDS:
            raise ValueError(f"grid {self.grid!r}")


@register_layer("quantized")
class QuantizedLayer(LowRankLayer):
    """Base of the layers on Q, in values of `grid`, once the update is applied.

    Buffers start_A (g*r, i), start_B (o, r): what was subtracted from W before the rounding.
    """

    start_A: Tensor
    start_B: Tensor

    Settings = QuantizedSettings
    not_exported = f"lies on quantised weights; {MERGE}"
    not_combined = not_exported
    has_factors = False
    takes_packed = forms_weight = False

    def __init__(self, base: nn.Module, rank: int, scale: float, *, grid: str, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        self.grid = grid
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))
        self.__dict__["whole"] = None  # W while Q is in its place; not a parameter, so nothing moves or saves it

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> QuantizedLayer:
        if spec.kind == "embedding":
            raise UserError(f"adapt.quantize: '{spec.path}' is an embedding, which stays whole; exclude it.")
        layer = QuantizedLinear if spec.kind in LINEAR else QuantizedConv
        return layer(base, dropout=dropout, dtype=dtype, grid=spec.settings.grid, **cls._options(spec.settings))

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(spec)
        return {**shapes, "start_A": shapes["lora_A"], "start_B": shapes["lora_B"]}

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        super().set_factors(A, B, offset)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)
        self.apply_update()

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "start_A": self.start_A, "start_B": self.start_B}

    def low_rank(self) -> LowRank:
        raise UserError(f"adapter on quantised weights: {MERGE}.")

    def merged(self) -> nn.Module:
        """Return the stock module with Q + s B A, rounded once to the weight's dtype."""
        self.apply_update()
        return super().merged()

    @torch.no_grad()
    def apply_update(self) -> None:
        if self.whole is not None or self.weight.is_meta:
            return
        W = self.weight
        start = LowRank(self._block_diagonal(double(self.start_B)), double(self.start_A), scale=self.scale)
        rest = (double(self.matrix(W)) - start.delta()).to(W.device, working_dtype(W))
        self.weight = nn.Parameter(self.stored(on_grid(rest, self.grid)).to(W.dtype), requires_grad=W.requires_grad)
        self.__dict__["whole"] = W

    def remove_update(self) -> None:
        if self.whole is not None:
            W, Q = self.whole, self.weight
            W.data = W.data.to(Q.device, Q.dtype)  # the model may have been moved meanwhile
            self.weight, self.__dict__["whole"] = W, None

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)
        if self.whole is not None and self.whole.dtype != self.weight.dtype:
            self.remove_update()
            self.apply_update()  # else the next file written, which needs W, would change the function
        return self


class QuantizedLinear(QuantizedLayer, LowRankLinear):
    """nn.Linear or Conv1D on a quantised weight."""


class QuantizedConv(QuantizedLayer, LowRankConv):
    """A convolution on a quantised weight."""
