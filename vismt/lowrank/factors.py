"""A matrix of low rank, held as its factors: `delta = scale * B @ C @ A`.

C is the identity (LoRA, PiSSA, CorDA, an AMT expert), a diagonal (singular values, gates over rank groups) or a full
matrix (PoLAR's Theta). Everything that needs the spectrum of the (out, in) matrix goes through a QR of the two
factors and an SVD of the small matrix between them: O((o + i) k^2) time, and the (out, in) matrix is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale * B @ core @ A`, the weight of a linear map from `i` to `o` features.

    Args:
        B: Factor (o, k), floating point.
        A: Factor (k, i), floating point, on the device of `B`.
        core: Matrix (k, k), a diagonal (k,), or None for the identity.
        scale: Finite factor, `alpha / rank` for LoRA.

    Raises:
        UserError: If the shapes do not fit. The message names both shapes.
    """

    B: Tensor
    A: Tensor
    core: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        left, right = tuple(self.B.shape), tuple(self.A.shape)
        if len(left) != 2 or len(right) != 2 or left[1] != right[0] or left[1] == 0:
            raise UserError(
                f"low-rank factors: B is {left} and A is {right}, needed (out, rank) and (rank, in) with rank >= 1."
            )
        if self.core is not None and tuple(self.core.shape) not in ((self.rank,), (self.rank, self.rank)):
            raise UserError(
                f"low-rank core: core is {tuple(self.core.shape)} between B {left} and A {right}, "
                f"needed ({self.rank},) or ({self.rank}, {self.rank})."
            )
        if not -float("inf") < self.scale < float("inf"):
            raise UserError(f"low-rank scale: {self.scale} is not finite, give a finite number.")

    @property
    def L(self) -> Tensor:
        """The earlier name of `B`."""
        return self.B

    @property
    def R(self) -> Tensor:
        """The earlier name of `A`."""
        return self.A

    @property
    def rank(self) -> int:
        """Number of columns of `B`, an upper bound of the rank of the matrix."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of the weight that the factors stand for."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """Return the same factors on another device, in another dtype, or both."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        core = None if self.core is None else move(self.core)
        return replace(self, B=move(self.B), A=move(self.A), core=core)

    def delta(self) -> Tensor:
        """Return the matrix itself, (o, i), computed and returned in fp32, or in fp64 when a factor is fp64."""
        work = self._in_working_precision()
        return work.scale * (times_core(work.B, work.core) @ work.A)

    def apply(self, x: Tensor) -> Tensor:
        """Return `x @ delta().T` without forming the matrix: x (..., i) -> (..., o).

        The product runs in the factors' dtype, and the result has the dtype of x.
        """
        hidden = F.linear(x.to(self.A.dtype), self.A)
        if self.core is not None:
            hidden = hidden * self.core if self.core.ndim == 1 else F.linear(hidden, self.core)
        return (self.scale * F.linear(hidden, self.B)).to(x.dtype)

    def svd(self) -> LowRank:
        """Return the singular value decomposition of the matrix, as factors.

        Returns `B` = U (o, m) and `A` = Vh (m, i), both orthonormal, `core` = the singular values (m,) in descending order and
        scale 1, where m = min(k, o, i). The decomposition is computed and returned in fp32, or in fp64 if a factor is fp64.
        """
        left, small, right = self._small()
        u, values, vh = torch.linalg.svd(small, full_matrices=False)
        return LowRank(left @ u, vh @ right, values)

    @property
    def singular_values(self) -> Tensor:
        """The core (m,) of what `svd` returns."""
        assert self.core is not None
        return self.core

    def truncate(self, rank: int) -> LowRank:
        """Return the best approximation of at most `rank` in both the Frobenius and the spectral norm (Eckart-Young)."""
        if not 1 <= rank <= self.rank:
            raise UserError(f"truncate: rank {rank} is outside 1..{self.rank}, the rank of these factors.")
        return _leading(self.svd(), rank)

    def stable_rank(self) -> float:
        """Return `||delta||_F^2 / ||delta||_2^2`, in [1, rank]. A zero matrix gives 0.0."""
        values = torch.linalg.svdvals(self._small()[1])
        if values[0] == 0:
            return 0.0
        return float(((values / values[0]) ** 2).sum())

    def compact(self, tolerance: float | None = None) -> LowRank:
        """Return the same matrix without its vanishing singular values. At least one singular value is kept.

        Args:
            tolerance: Relative size. A singular value of at most `tolerance` times the largest counts as zero. The default is
                `max(o, i)` times the machine epsilon of the dtype that the SVD runs in.
        """
        decomposed = self.svd()
        values = decomposed.singular_values
        if tolerance is None:
            tolerance = max(self.shape) * torch.finfo(values.dtype).eps
        return _leading(decomposed, max(1, int((values > tolerance * values[0]).sum())))

    def balanced(self) -> LowRank:
        """Return the same matrix as plain `B @ A` with scale 1.

        Both factors hold the square roots of the singular values.
        """
        decomposed = self.svd()
        root = decomposed.singular_values.sqrt()
        return LowRank(decomposed.B * root, root[:, None] * decomposed.A)

    def plain(self) -> LowRank:
        """Return the same matrix without a core. The singular values of a core go to both sides evenly.

        A matrix without a core is returned itself.
        """
        if self.core is None:
            return self
        if self.core.ndim == 1 and bool((self.core >= 0).all()):
            root = self.core.sqrt()
            return LowRank(self.B * root, root[:, None] * self.A, scale=self.scale)
        return LowRank(times_core(self.B, self.core), self.A, scale=self.scale)

    def _in_working_precision(self) -> LowRank:
        dtype = torch.promote_types(torch.promote_types(self.B.dtype, self.A.dtype), torch.float32)
        if self.core is not None:
            dtype = torch.promote_types(dtype, self.core.dtype)
        return self.to(dtype=dtype)

    def _small(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q_L (o, p), the small matrix (p, q) and Q_R (q, i) with delta = Q_L @ small @ Q_R. Both Q are orthonormal."""
        work = self._in_working_precision()
        left, upper_left = torch.linalg.qr(work.B)
        right, upper_right = torch.linalg.qr(work.A.mT)
        return left, work.scale * (times_core(upper_left, work.core) @ upper_right.mT), right.mT


def times_core(left: Tensor, core: Tensor | None) -> Tensor:
    """Return `left @ core` (o, k) for a (k, k) core, a diagonal (k,), or None for the identity."""
    if core is None:
        return left
    return left * core if core.ndim == 1 else left @ core


def _leading(decomposed: LowRank, rank: int) -> LowRank:
    return LowRank(
        decomposed.B[:, :rank].contiguous(), decomposed.A[:rank].contiguous(), decomposed.singular_values[:rank]
    )
