"""The update of one weight and its bias, as a matrix that is computed row by row.

low rank   D = s B A; of a stack of experts, a pair of factors for each, one below another DoRA       D = m (W + s B A) / |W + s
B A|_row - W       (arXiv 2402.09353)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.lowrank.factors import LowRank


@dataclass(frozen=True)
class Update:
    """The update of one module by an adapter.

    blocks: Pairs of factors. The rows of each pair follow the rows of the pair before. Empty if the weight stays as it is.
    magnitude: Magnitude m (o,) of DoRA. bias: Change of the bias (o,).
    """

    blocks: tuple[LowRank, ...] = ()
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of the weight."""
        return sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]

    def delta(self, rows: slice) -> Tensor:
        """Return rows of s B A in fp32, or in fp64 for fp64 factors."""
        dtype = torch.promote_types(self.blocks[0].B.dtype, torch.float32)
        parts, end = [], 0
        for block in self.blocks:
            start, end = end, end + block.shape[0]
            if start < rows.stop and rows.start < end:
                B = block.B[max(rows.start - start, 0) : rows.stop - start]
                parts.append(block.scale * (B.to(dtype) @ block.A.to(dtype)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def step(self, W: Tensor, rows: slice, factor: float) -> Tensor:
        """Return what a merge with `factor` times the pairs of factors adds to the rows W (n, i)."""
        delta = factor * self.delta(rows).to(W.dtype)
        if self.magnitude is None:
            return delta
        total = W + delta
        lengths = total.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return total * (self.magnitude[rows, None].to(W.dtype) / lengths) - W

    def norm(self) -> float:
        """Return |s B A|_F from the factors, in fp64."""
        squares = 0.0
        for block in self.blocks:
            B, A = block.B.double(), block.A.double()
            squares += block.scale**2 * float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0))
        return squares**0.5

    def product(self, E: Tensor) -> float:
        """Return <E, s B A> without forming the matrix."""
        rows = E.split([block.shape[0] for block in self.blocks])
        return sum(
            block.scale * float((block.B.to(E.dtype) * (part @ block.A.to(E.dtype).T)).sum(dtype=torch.float64))
            for block, part in zip(self.blocks, rows, strict=True)
        )
