"""The router's arithmetic: the weight of each expert for a token, and the multiplication of the pre-activations.

    omega = (1 - a) K softmax(z) + a        z (..., K) router logits / temperature, a in [0, 1]; the mean over experts is 1
    gated = u * omega                       u (..., H) pre-activations; unit h has the omega of its expert, labels[h]

EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884, eq. 8, 9, 12; the paper's alpha is 1 - a). The released code expands
the weights to (b, n, H) and saves them and u for backward. Here backward needs z and the product alone, which the activation
saves anyway: with p_e the sum of grad * gated over the units of expert e,

    dL/du = grad * omega        dL/dz_e = (1 - a) K (q_e - g_e sum_j q_j),   q_e = p_e g_e / omega_e,  g = softmax(z)

g / omega is bounded: it is 1 / K at a = 0, where omega may be 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_weights(logits: Tensor, fade: float) -> Tensor:
    """Return omega (..., e) for logits (..., e), in fp32, or fp64 for fp64 logits; exactly 1 at fade = 1."""
    shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (1 - fade) * logits.shape[-1] * shares + fade


def gate(units: Tensor, logits: Tensor, labels: Tensor, fade: float) -> Tensor:
    """Multiply pre-activations (..., H) by the weight of each unit's expert, labels (H,) of logits (..., e); dtype of units."""
    return _Gate.apply(units, logits, labels, fade)


def idle(units: Tensor, weight: Tensor) -> Tensor:
    """Return `units` unchanged, with a zero gradient for `weight`, so that a faded router stays in the graph.

    An optimiser and a wrapper that waits for all gradients (DistributedDataParallel) then work as before the end of the fade.
    """
    return _Idle.apply(units, weight) if weight.requires_grad and torch.is_grad_enabled() else units


def _members(labels: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (H, e) with 1 where a unit belongs to an expert."""
    return F.one_hot(labels, experts).to(dtype)


def _of_units(omega: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (..., H) of the units from omega (..., e) of their experts.

    A product with ones and zeros is exact, and on a CPU faster in half precision than `index_select`.
    """
    return omega.to(dtype) @ _members(labels, omega.shape[-1], dtype).t()


class _Gate(torch.autograd.Function):
    """(u (..., H), z (..., e), labels (H,), a) -> u * omega (..., H); saves z and the output for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(units: Tensor, logits: Tensor, labels: Tensor, fade: float) -> Tensor:
        return _of_units(expert_weights(logits, fade), labels, units.dtype).mul_(units)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, logits, labels, ctx.fade = inputs
        ctx.save_for_backward(logits, labels, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, gated = ctx.saved_tensors
        fade, experts = ctx.fade, logits.shape[-1]
        omega = expert_weights(logits, fade)
        grad_units = _of_units(omega, labels, grad.dtype).mul_(grad) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_units, None, None, None
        shares = logits.softmax(-1, dtype=omega.dtype)
        pulls = ((grad * gated) @ _members(labels, experts, grad.dtype)).to(omega.dtype)
        pulls = pulls * (shares / omega if fade else 1 / experts)
        grad_logits = (1 - fade) * experts * (pulls - shares * pulls.sum(-1, keepdim=True))
        return grad_units, grad_logits.to(logits.dtype), None, None


class _Idle(torch.autograd.Function):
    """(u, weight) -> u; the gradient of weight is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(units: Tensor, weight: Tensor) -> Tensor:
        return units.view_as(units)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])
