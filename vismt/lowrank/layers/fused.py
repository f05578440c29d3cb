"""A linear with a low-rank update as one autograd function.

    y = W x + b + s * (B A x - B0 A0 x)        forward of a batch x (n, i), block by block of the outputs

It adds the low-rank product to the output of the base GEMM (addmm). It saves only its input and the r-wide hidden product. It
never computes the gradient of a frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.lowrank.layers.gates import by_sample, gated

try:  # private parts of torch, which save time
    from torch._C import _are_functorch_transforms_active as transforms_active
    from torch._functorch.utils import unwrap_dead_wrappers

    reshaped = torch.ops.aten._unsafe_view
    PRIVATE = hasattr(super(torch.autograd.Function, torch.autograd.Function), "apply")
except (ImportError, AttributeError):  # a release of torch without them: its public functions do the same
    PRIVATE = False


def _add_product(out: Tensor, hidden: Tensor, B: Tensor, scale: float, blocks: tuple[int, ...]) -> None:
    """Add scale * hidden (n, g*r) times B^T to `out` (n, o), block by block of the outputs, in place."""
    if len(blocks) == 1:
        out.addmm_(hidden, B.t(), alpha=scale)
        return
    for columns, h, b in zip(out.split(blocks, 1), hidden.chunk(len(blocks), 1), B.split(blocks, 0)):
        columns.addmm_(h, b.t(), alpha=scale)


def _pull_back(grad: Tensor, B: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Return the gradient at the hidden product, (n, g*r) for grad (n, o), without the scale."""
    if len(blocks) == 1:
        return grad @ B
    return torch.cat([g @ b for g, b in zip(grad.split(blocks, 1), B.split(blocks, 0))], 1)


def _scaled_product(scale: float, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Return scale * left @ right in one call of BLAS; `like` has the shape of the result and is not read."""
    return torch.addmm(like, left, right, beta=0, alpha=scale)


def _grad_B(scale: float, grad: Tensor, hidden: Tensor, B: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Return the gradient of B, (o, r), from grad (n, o) and hidden (n, g*r).

    The thin factor comes first, which BLAS runs up to 1.6x faster.
    """
    if len(blocks) == 1:
        return _scaled_product(scale, hidden.t(), grad, B.t()).t()
    parts = zip(hidden.chunk(len(blocks), 1), grad.split(blocks, 1), B.split(blocks, 0))
    return torch.cat([_scaled_product(scale, h.t(), g, b.t()).t() for h, g, b in parts], 0)


class PositionalFunction(torch.autograd.Function):
    """A function of autograd whose inputs are given in the order of `forward`.

    torch's own `apply` binds them to the signature of `forward` in each call, which takes as long as the function of a small
    batch. A signature in `forward.__signature__` that binds nothing would be public. It still takes a fifth longer than this.
    """

    @classmethod
    def apply(cls, *inputs: object) -> Any:
        if not PRIVATE or transforms_active():
            return super().apply(*inputs)
        bound = super(torch.autograd.Function, cls).apply  # type: ignore[misc]  # missing in the stubs of torch
        return bound(*unwrap_dead_wrappers(inputs))


class FusedLowRank(PositionalFunction):
    """(x (..., i), W (o, i), b, A, B, A0, B0, gate (b, g*r), scale, blocks) -> y (..., o), hidden (n, g*r).

    hidden = x A^T, before the gate, is an output, so that it can be kept for backward and is still differentiable. The function
    therefore works under create_graph and torch.func.
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
        dtype = x.dtype
        flat = x.reshape(-1, x.shape[-1])
        out = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
        hidden = flat @ A.to(dtype).t()
        _add_product(out, gated(hidden, gate), B.to(dtype), scale, blocks)
        if A0 is not None and B0 is not None:
            _add_product(out, flat @ A0.to(dtype).t(), B0.to(dtype), -scale, blocks)
        # A view as one of several outputs could not be changed in place by the model, as Falcon does.
        shape = (*x.shape[:-1], out.shape[-1])
        return reshaped(out, shape) if PRIVATE else out.view(shape).clone(), hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, A, B, A0, B0, gate, ctx.scale, ctx.blocks = inputs
        ctx.has_bias = bias is not None
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        # x is needed for the gradients of A and W alone. If both are frozen, x is not kept.
        ctx.save_for_backward(
            x if A.requires_grad or weight.requires_grad else None, weight, A, B, A0, B0, gate, output[1]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, A, B, A0, B0, gate, hidden = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        need_gate = ctx.needs_input_grad[7]
        dtype, scale, blocks = hidden.dtype, ctx.scale, ctx.blocks
        A, B = A.to(dtype), B.to(dtype)
        grad_x = grad_weight = grad_bias = grad_A = grad_B = grad_gate = None
        if x is not None:
            x = x.reshape(-1, x.shape[-1])
        if grad is not None:
            grad = grad.reshape(-1, grad.shape[-1])
        # The gradient at the hidden product is factor * at_hidden.
        at_hidden, factor = grad_hidden, 1.0
        if grad is not None and (need_x or need_A or need_gate):
            pulled = _pull_back(grad, B, blocks)
            if need_gate:
                grad_gate = by_sample(pulled * hidden, gate).sum(1) * scale
            at_hidden, factor = gated(pulled, gate), scale
            if grad_hidden is not None:
                at_hidden, factor = grad_hidden + scale * at_hidden, 1.0
        if need_x and at_hidden is not None:
            grad_x = at_hidden @ A if grad is None else (grad @ weight.to(dtype)).addmm_(at_hidden, A, alpha=factor)
            if grad is not None and A0 is not None and B0 is not None:
                grad_x.addmm_(_pull_back(grad, B0.to(dtype), blocks), A0.to(dtype), alpha=-scale)
            grad_x = grad_x.view(ctx.shape)
        if need_A and at_hidden is not None:
            grad_A = _scaled_product(factor, at_hidden.t(), x, A)
        if grad is not None:
            grad_B = _grad_B(scale, grad, gated(hidden, gate), B, blocks) if need_B else None
            grad_weight = grad.t() @ x if need_weight else None
            grad_bias = grad.sum(0) if need_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, grad_gate, None, None
