"""Hosts of one low-rank update: a frozen weight, its factors, one fused forward and backward.

    y = W x + b + s * (B C A x - B0 A0 x)        W (o, i), A (r, i), B (o, r); A0, B0 only after a principal start

The fused function adds the low-rank product into the output of the base GEMM (addmm), saves its input and the r-wide
hidden product and nothing else, and never computes the gradient of a frozen weight. A fused projection (timm's qkv) may
carry one factor pair per output block: A stacks the blocks' A, row block j of B meets hidden block j. A core C, (r, r) or
a diagonal (r,), where a method has one, goes into B before the tokens come: O(o r^2), whatever their number. Gates of rank
groups, one row for each sample (iLoRA), scale the hidden product: one r-wide multiplication a token, no output per expert.

Sources: LoRA, arXiv 2106.09685; the block form follows the per-projection factors of AMT (NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from vismt.lowrank.adapter_layer import Host
from vismt.lowrank.factors import LowRank, times_core
from vismt.lowrank.instance_gates import by_sample, fixed_gates, gated, sample_gates


def _add_product(out: Tensor, hidden: Tensor, B: Tensor, scale: float, blocks: tuple[int, ...]) -> None:
    """Out (n, o) += scale * hidden (n, g*r) times B^T, block by block of the outputs, in place."""
    if len(blocks) == 1:
        out.addmm_(hidden, B.t(), alpha=scale)
        return
    for part, h, b in zip(out.split(blocks, 1), hidden.chunk(len(blocks), 1), B.split(blocks, 0)):
        part.addmm_(h, b.t(), alpha=scale)


def _pull_back(grad: Tensor, B: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """(n, o) -> (n, g*r): the gradient at the hidden product, without the scale."""
    if len(blocks) == 1:
        return grad @ B
    return torch.cat([g @ b for g, b in zip(grad.split(blocks, 1), B.split(blocks, 0))], 1)


def _grad_B(grad: Tensor, hidden: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """(o, r) from grad (n, o) and hidden (n, g*r); the thin factor comes first, which BLAS runs up to 1.6x faster."""
    if len(blocks) == 1:
        return (hidden.t() @ grad).t()
    return torch.cat([(h.t() @ g).t() for g, h in zip(grad.split(blocks, 1), hidden.chunk(len(blocks), 1))], 0)


class _FusedLowRank(torch.autograd.Function):
    """(x (n, i), W (o, i), b, A, B, A0, B0, gate (b, g*r), scale, blocks) -> y (n, o), hidden (n, g*r).

    hidden = x A^T, before the gate, is an output so that it can be kept for backward and is still differentiable: the
    function works under create_graph and torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        gate: Tensor | None,
        scale: float,
        blocks: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        kind = x.dtype
        out = F.linear(x, weight.to(kind), None if bias is None else bias.to(kind))
        hidden = x @ A.to(kind).t()
        _add_product(out, gated(hidden, gate), B.to(kind), scale, blocks)
        if A0 is not None and B0 is not None:
            _add_product(out, x @ A0.to(kind).t(), B0.to(kind), -scale, blocks)
        return out, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, A, B, A0, B0, gate, ctx.scale, ctx.blocks = inputs
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        # x serves the gradient of A and W alone: with both frozen it need not be kept.
        ctx.save_for_backward(
            x if A.requires_grad or weight.requires_grad else None, weight, A, B, A0, B0, gate, output[1]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, A, B, A0, B0, gate, hidden = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        need_gate = ctx.needs_input_grad[7]
        kind, scale, blocks = hidden.dtype, ctx.scale, ctx.blocks
        grad_x = grad_weight = grad_bias = grad_A = grad_B = grad_gate = None
        at_hidden = grad_hidden
        if grad is not None and (need_x or need_A or need_gate):
            pulled = _pull_back(grad, B.to(kind), blocks) * scale
            if need_gate:
                grad_gate = by_sample(pulled * hidden, gate).sum(1)
            pulled = gated(pulled, gate)
            at_hidden = pulled if grad_hidden is None else pulled + grad_hidden
        if need_x and at_hidden is not None:
            grad_x = at_hidden @ A.to(kind) if grad is None else (grad @ weight.to(kind)).addmm_(at_hidden, A.to(kind))
            if grad is not None and A0 is not None and B0 is not None:
                grad_x.addmm_(_pull_back(grad, B0.to(kind), blocks), A0.to(kind), alpha=-scale)
        if need_A and at_hidden is not None:
            grad_A = at_hidden.t() @ x
        if grad is not None:
            grad_B = _grad_B(grad, gated(hidden, gate) * scale, blocks) if need_B else None
            grad_weight = grad.t() @ x if need_weight else None
            grad_bias = grad.sum(0) if need_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, grad_gate, None, None


GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Adapted(Host):
    """A host of a low-rank update.

    Parameters lora_A (g*r, i), lora_B (o, r) and, with a core, lora_C (g*r, r) or (g*r,) are new. Buffers lora_A0, lora_B0
    hold the start of a principal initialisation. With `experts` e the rank is e groups in a row, gated by `instance_gates`.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        *,
        blocks: tuple[int, ...] | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        core: tuple[int, ...] = (),
        experts: int | None = None,
    ) -> None:
        super().__init__(base)
        self.experts = experts
        self.rank, self.scale, self.dropout = rank, scale, dropout
        out_features, in_features = self.matrix(self.weight).shape
        self.blocks = blocks or (out_features,)
        kind = dtype or (torch.float32 if self.weight.dtype in (torch.bfloat16, torch.float16) else self.weight.dtype)
        where = {"device": self.weight.device, "dtype": kind}
        self.lora_A = nn.Parameter(torch.empty(len(self.blocks) * rank, in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, **where))
        self.lora_C = nn.Parameter(torch.zeros(core, **where)) if core else None
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        """Copy A (g*r, i) and B (o, r) in; with `offset` they are also kept as the start that is subtracted."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        if offset:
            self.lora_A0, self.lora_B0 = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> dict[str, Tensor]:
        """The tensors that an adapter file holds for this host, by name."""
        named = {name: getattr(self, name) for name in ("lora_A", "lora_B", "lora_C", "lora_A0", "lora_B0")}
        return {name: value for name, value in named.items() if value is not None}

    def left(self) -> Tensor:
        """B C (o, r), block by block: what meets the hidden product; B itself without a core."""
        if self.lora_C is None:
            return self.lora_B
        cores = self.lora_C.chunk(len(self.blocks))
        return torch.cat([times_core(b, c) for b, c in zip(self.lora_B.split(self.blocks, 0), cores)])

    def gate(self, x: Tensor) -> Tensor | None:
        """The gates in force, for the hidden channels of the samples of x (b, ...): (b or 1, g*r) in its dtype."""
        if self.experts is None:
            return None
        gates = sample_gates(x.shape[0], self.experts).to(x.device, x.dtype)
        return repeat(gates, "b e -> b (g e r)", g=len(self.blocks), r=self.rank // self.experts)

    def need_idle(self, what: str, path: str) -> None:
        if self.experts is not None:
            fixed_gates(what, self.experts)

    def fixed_left(self) -> Tensor:
        """`left()` with the one row of gates in it that a single weight can hold."""
        if self.experts is None:
            return self.left()
        left = self.left().to(torch.promote_types(self.lora_B.dtype, torch.float32))
        return left * repeat(fixed_gates("merge", self.experts).to(left), "e -> (e r)", r=self.rank // self.experts)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy factors in; starts that the host lacks are created."""
        for name, value in tensors.items():
            if name in ("lora_A0", "lora_B0"):
                like = self.lora_A if name == "lora_A0" else self.lora_B
                setattr(self, name, value.to(device=like.device, dtype=like.dtype))
            else:
                getattr(self, name).copy_(value)

    def low_rank(self) -> LowRank:
        """The whole update against the stock weight as one LowRank: rank r, 2r with a start, g times that in blocks."""
        A, B = self.lora_A.detach(), self._block_diagonal(self.fixed_left().detach())
        if self.lora_A0 is not None:
            A = torch.cat([A, self.lora_A0])
            B = torch.cat([B, -self._block_diagonal(self.lora_B0)], 1)
        return LowRank(B, A, scale=self.scale)

    def _block_diagonal(self, B: Tensor) -> Tensor:
        return B if len(self.blocks) == 1 else torch.block_diag(*B.split(self.blocks, 0))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The stock module with W + DeltaW, summed in fp32 (fp64 for fp64) and rounded once to the weight's dtype."""
        kind = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        total = self.matrix(self.weight).to(kind, copy=True)
        for start in (False, True):
            A, B = (self.lora_A0, self.lora_B0) if start else (self.lora_A, self.fixed_left())
            if A is None:
                continue
            parts = zip(
                total.split(self.blocks, 0), B.to(kind).split(self.blocks, 0), A.to(kind).chunk(len(self.blocks))
            )
            for rows, b, a in parts:
                rows.addmm_(b, a, alpha=-self.scale if start else self.scale)
        weight = torch.empty_like(self.weight)
        weight.copy_(self.stored(total))
        return self._stock(nn.Parameter(weight, requires_grad=self.weight.requires_grad))

    def extra_repr(self) -> str:
        out_features, in_features = self.matrix(self.weight).shape
        start = ", start kept" if self.lora_A0 is not None else ""
        return (
            f"{type(self.shell).__name__}({in_features}, {out_features}), rank={self.rank}, scale={self.scale:g}{start}"
        )


class AdaptedLinear(Adapted):
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
            hidden = gated(F.dropout(flat, self.dropout) @ self.lora_A.to(x.dtype).t(), self.gate(x))
            pairs = zip(hidden.chunk(len(self.blocks), 1), self.left().to(x.dtype).split(self.blocks, 0))
            out = out + self.scale * torch.cat([h @ b.t() for h, b in pairs], 1)
        else:
            factors = self.lora_A, self.left(), self.lora_A0, self.lora_B0
            out, _ = _FusedLowRank.apply(flat, weight, self.bias, *factors, self.gate(x), self.scale, self.blocks)
        return out.view(*x.shape[:-1], out.shape[-1])


class AdaptedConv2d(Adapted):
    """nn.Conv2d (groups = 1): A is a convolution of the same geometry with r output channels, B a 1x1 convolution.

    forward: x (b, c, h, w) -> (b, o, h', w'). The matrix form is the weight reshaped to (o, c*kh*kw).
    """

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

    def _product(self, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None = None) -> Tensor:
        kernel = A.to(self.weight.dtype).view(-1, *self.weight.shape[1:])
        hidden = self.shell._conv_forward(x, kernel, None)
        if gate is not None:
            hidden = hidden * gate[:, :, None, None]
        return F.conv2d(hidden, B.to(self.weight.dtype)[:, :, None, None])
