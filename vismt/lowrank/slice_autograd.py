"""y = W x + b where only some rows or columns of W get a gradient, and only what this gradient needs is kept.

    dim 1 (columns J): dL/dp = g^T x[:, J]    (o, k), x[:, J] is kept
    dim 0 (rows J):    dL/dp = g[:, J]^T x    (k, i), x is kept            dL/dx = g W

g (n, o) is the gradient at y, x (n, i). The gradient of W is never formed, dL/dp is an ordinary .grad. Of x[:, J] a copy is
kept: a view would hold all of x. Source: S2FT, arXiv 2412.06289; its timed code slices the other axis and passes the
gradient around autograd, which loses it under checkpointing and accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int] | None


def take(tensor: Tensor, dim: int, place: Tensor, span: Span) -> Tensor:
    """Return the features at `place`, or those of a range, as a view."""
    return tensor.index_select(dim, place) if span is None else tensor.narrow(dim, span[0], span[1] - span[0])


class PartialLinear(torch.autograd.Function):
    """(x (n, i), W (o, i), b, values, place (k,), span, dim, adds, keeps) -> y (n, o), picked (n, k) or empty.

    adds: `values` is a difference to W's slice that is not in W yet; otherwise W holds it. keeps: whether to save what the
    gradient of `values` needs. picked = x[:, J] is an output so that the saved tensor stays differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        place: Tensor,
        span: Span,
        dim: int,
        adds: bool,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        picked = take(x, 1, place, span).clone() if dim == 1 and (keeps or adds) else x.new_empty(0)
        if adds and dim == 1:
            out.addmm_(picked, values.to(dtype).t())
        elif adds:
            out.index_add_(1, place, x @ values.to(dtype).t())
        return out, picked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, values, place, ctx.span, ctx.dim, ctx.adds, keeps = inputs
        ctx.has_bias, ctx.dtype, ctx.shape = bias is not None, x.dtype, x.shape
        ctx.set_materialize_grads(False)
        saved = (output[1] if ctx.dim == 1 else x) if keeps else None
        ctx.save_for_backward(saved, weight, values if ctx.adds else None, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_picked: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, weight, values, place = ctx.saved_tensors
        need_x, _, need_bias, need_values = ctx.needs_input_grad[:4]
        grad_x = grad_bias = grad_values = None
        if grad is not None:
            if need_x:
                grad_x = grad @ weight.to(ctx.dtype)
                if ctx.adds and ctx.dim == 1:
                    grad_x.index_add_(1, place, grad @ values.to(ctx.dtype))
                elif ctx.adds:
                    grad_x.addmm_(take(grad, 1, place, ctx.span), values.to(ctx.dtype))
            if need_values:  # the thin factor comes first, which BLAS runs faster
                grad_values = (saved.t() @ grad).t() if ctx.dim == 1 else take(grad, 1, place, ctx.span).t() @ saved
            grad_bias = grad.sum(0) if need_bias and ctx.has_bias else None
        if need_x and grad_picked is not None and grad_picked.numel():
            grad_x = (grad_picked.new_zeros(ctx.shape) if grad_x is None else grad_x).index_add(1, place, grad_picked)
        return grad_x, None, grad_bias, grad_values, None, None, None, None, None
