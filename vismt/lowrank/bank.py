"""E factor pairs stacked in two tensors, mixed by gates in one batched product.

    y = base + scale * sum_e gate_e * B_e A_e x  =  base + ((x A^T) * spread(gate) * scale) B^T

with A (e r, i) and B (o, e r) the stacked factors and `spread` giving each expert's gate to its r rank channels. A gate
per sample (iLoRA: rank groups of one LoRA) costs what a static one does (AMT: one mixture per task), and neither builds
an output per expert, (e, tokens, o).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank


class FactorBank(nn.Module):
    """E low-rank experts of one (o, i) weight.

    Args:
        in_features, out_features: i and o of the weight.
        experts: E >= 1.
        rank: rank r of each expert; the bank as a whole has rank E r.
        scale: the same for all experts (iLoRA: alpha / r with this r, not alpha / (E r)).
        generator: source of the initial values; None seeds one with 0, the global generator is never used.

    Parameters `A` (e, r, i) and `B` (e, o, r). A starts kaiming-uniform (a = sqrt 5), B at zero: every mixture is zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        rank: int,
        *,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if experts < 1 or not 1 <= rank <= min(in_features, out_features):
            raise UserError(
                f"bank of {experts} experts of rank {rank} on a ({out_features}, {in_features}) weight: "
                f"needs at least one expert and 1 <= rank <= {min(in_features, out_features)}."
            )
        self.scale = float(scale)
        self.A = nn.Parameter(torch.empty(experts, rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(experts, out_features, rank, device=device, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0; in fp32 on the generator's device, the same on every device."""
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        bound = 1 / math.sqrt(self.A.shape[2])
        if not self.A.is_meta:
            drawn = torch.rand(self.A.shape, generator=generator, device=generator.device, dtype=torch.float32)
            self.A.copy_((2 * drawn - 1) * bound)
        self.B.zero_()

    @classmethod
    @torch.no_grad()
    def stack(cls, experts: Sequence[LowRank]) -> FactorBank:
        """Return a bank with copies of trained experts, all of one shape and rank, in the order given.

        Equal scales are kept as the bank's; a core, or scales that differ, are multiplied into B.
        """
        if not experts:
            raise UserError("bank: no expert given, need at least one.")
        first = experts[0]
        for position, expert in enumerate(experts):
            if expert.shape != first.shape or expert.rank != first.rank:
                raise UserError(
                    f"bank: expert {position} is {expert.shape} of rank {expert.rank}, expert 0 is {first.shape} of rank "
                    f"{first.rank}: all must agree."
                )
        plain = all(expert.core is None and expert.scale == first.scale for expert in experts)
        bank = cls(
            first.shape[1],
            first.shape[0],
            len(experts),
            first.rank,
            scale=first.scale if plain else 1.0,
            device=first.L.device,
            dtype=first.L.dtype,
        )
        for position, expert in enumerate(experts):
            bank.A[position] = expert.R
            bank.B[position] = expert.L if plain else _fold(expert)
        return bank

    def forward(self, x: Tensor, gates: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the gated sum of all experts on `x`, added to `base`.

        Args:
            x: (b, ..., i).
            gates: (e,) for all samples, (b, e) per sample, or (b, n, e) per token of an x of (b, n, i). Gates may be
                zero, negative, and need not sum to one.
            base: (b, ..., o), the frozen layer's output; None stands for zero.

        Returns:
            (b, ..., o) in the dtype of `x`; runs in the factors' dtype. Gradients reach A, B, gates, x and base.

        Raises:
            UserError: when the leading axes of `gates` are not those of `x`.
        """
        experts, rank, _ = self.A.shape
        self._check_gates(x, gates)
        down = rearrange(self.A, "e r i -> (e r) i")
        up = rearrange(self.B, "e o r -> (e r) o")
        spread = self.scale * repeat(gates, "... e -> ... (e r)", r=rank)
        spread = spread.reshape(*gates.shape[:-1], *[1] * (x.ndim - gates.ndim), experts * rank)
        hidden = F.linear(x.to(down.dtype), down)
        hidden = (hidden * spread.to(hidden.dtype)).flatten(0, -2)
        if base is None:
            return (hidden @ up).reshape(*x.shape[:-1], up.shape[1]).to(x.dtype)
        mixed = torch.addmm(base.reshape(-1, up.shape[1]).to(hidden.dtype), hidden, up)
        return mixed.reshape(*x.shape[:-1], up.shape[1]).to(x.dtype)

    def delta(self, gates: Tensor) -> LowRank:
        """Return the mixture of static `gates` (e,) as one adapter of rank e r, gates on its diagonal core: it can be merged.

        Gradients reach A, B and gates. Per-sample gates have no single weight and raise UserError.
        """
        experts, rank, _ = self.A.shape
        if tuple(gates.shape) != (experts,):
            raise UserError(
                f"bank: gates are {tuple(gates.shape)}, one weight needs ({experts},); "
                "gates per sample give a weight per sample, so pass one row."
            )
        return LowRank(
            rearrange(self.B, "e o r -> o (e r)"),
            rearrange(self.A, "e r i -> (e r) i"),
            repeat(gates, "e -> (e r)", r=rank),
            self.scale,
        )

    @torch.no_grad()
    def merged(self, weight: Tensor, gates: Tensor) -> Tensor:
        """Return the weight (o, i) plus the mixture of static `gates` (e,), in one GEMM over the experts whose gate is not zero.

        Summed in fp32 (fp64 for fp64), rounded once to the weight's dtype; a new tensor on the weight's device.
        """
        self.delta(gates)  # for its checks
        active = gates.nonzero()[:, 0].to(self.A.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shares = gates.to(self.B.device, dtype)[active, None, None]
        left = rearrange(self.B[active].to(dtype) * shares, "e o r -> o (e r)")
        right = rearrange(self.A[active].to(dtype), "e r i -> (e r) i")
        return torch.addmm(weight.to(dtype), left, right, alpha=self.scale).to(weight.dtype)

    def expert(self, index: int) -> LowRank:
        """Return expert `index` as views of the bank's parameters."""
        if not 0 <= index < self.A.shape[0]:
            raise UserError(f"bank: no expert {index}, it has 0..{self.A.shape[0] - 1}.")
        return LowRank(self.B[index], self.A[index], None, self.scale)

    def extra_repr(self) -> str:
        experts, rank, features = self.A.shape
        return f"{features} -> {self.B.shape[1]}, experts={experts}, rank={rank}, scale={self.scale:g}"

    def _check_gates(self, x: Tensor, gates: Tensor) -> None:
        experts = self.A.shape[0]
        leading = tuple(gates.shape[:-1])
        if gates.ndim == 0 or gates.shape[-1] != experts or leading != tuple(x.shape[:-1])[: len(leading)]:
            raise UserError(
                f"bank: gates are {tuple(gates.shape)} for x {tuple(x.shape)}, needed ({experts},) or the leading axes of "
                f"x and then {experts}; with beams or repeated samples, repeat the gates too."
            )


def _fold(expert: LowRank) -> Tensor:
    left = expert.scale * expert.L
    if expert.core is None:
        return left
    return left * expert.core if expert.core.ndim == 1 else left @ expert.core
