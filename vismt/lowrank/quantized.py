"""Hosts whose frozen weight is what 4 bits hold of W less the start of the update (QPiSSA): quantised by rule, W kept beside.

    y = Q x + b + s B A x        Q = grid(W - s B0 A0), A0 and B0 the start as it is stored, grid of nf4.GRIDS

Q is a function of W, A0 and B0. An adapter file carries the start, so a host on the original W finds the same Q again;
fp64 before the rounding keeps the order of a BLAS's sums from deciding which level is nearer. Q is a parameter of its own in
the place of W, in W's dtype; W comes back with `lift`. Against W the update has no low rank: it is merged, not exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.init import working_dtype
from vismt.lowrank.linear import Adapted, AdaptedConv2d, AdaptedLinear
from vismt.lowrank.nf4 import on_grid
from vismt.lowrank.svd import double

MERGE = "against the original weights its update is no pair of factors; merge the model and save it whole"


class Quantized(Adapted):
    """A host on Q, in values of `grid`, once it is settled.

    Buffers start_A (g*r, i), start_B (o, r): what was taken out of W before the rounding.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, *, grid: str, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        self.grid = grid
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))
        self.__dict__["whole"] = None  # W while Q is in its place; not a parameter, so nothing moves or saves it

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        super().set_factors(A, B, offset)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)
        self.settle()

    def factors(self) -> dict[str, Tensor]:
        return {**super().factors(), "start_A": self.start_A, "start_B": self.start_B}

    def low_rank(self) -> LowRank:
        raise UserError(f"adapter on quantised weights: {MERGE}.")

    def merged(self) -> nn.Module:
        """The stock module with Q + s B A, rounded once to the weight's dtype."""
        self.settle()
        return super().merged()

    @torch.no_grad()
    def settle(self) -> None:
        if self.whole is not None or self.weight.is_meta:
            return
        W = self.weight
        start = LowRank(self._block_diagonal(double(self.start_B)), double(self.start_A), scale=self.scale)
        rest = (double(self.matrix(W)) - start.delta()).to(W.device, working_dtype(W))
        self.weight = nn.Parameter(self.stored(on_grid(rest, self.grid)).to(W.dtype), requires_grad=W.requires_grad)
        self.__dict__["whole"] = W

    def lift(self) -> None:
        if self.whole is not None:
            W, Q = self.whole, self.weight
            W.data = W.data.to(Q.device, Q.dtype)  # where the model was moved meanwhile
            self.weight, self.__dict__["whole"] = W, None

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        super()._apply(fn, recurse)
        if self.whole is not None and self.whole.dtype != self.weight.dtype:
            self.lift()
            self.settle()  # else the next file written, which needs W, would change the function
        return self


class QuantizedLinear(Quantized, AdaptedLinear):
    """nn.Linear or Conv1D on a quantised weight."""


class QuantizedConv2d(Quantized, AdaptedConv2d):
    """nn.Conv2d on a quantised weight."""
