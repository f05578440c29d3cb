"""The router's arithmetic: the weight of each expert for a token, and the multiplication of the pre-activations.

    omega = (1 - a) K softmax(z) + a        z (..., K) router logits / temperature, a in [0, 1]; the mean over experts is 1
    gated = u * omega                       u (..., H) pre-activations; unit h has the omega of its expert, labels[h]

EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884, eq. 8, 9, 12). The paper's alpha is 1 - a. The released code expands the
weights to (b, n, H) and saves them and u for backward. Here backward needs only z and the product, which the activation saves
anyway. With p_e the sum of grad * gated over the units of expert e,

    dL/du = grad * omega        dL/dz_e = (1 - a) K (q_e - g_e sum_j q_j),   q_e = p_e g_e / omega_e,  g = softmax(z)

g / omega is bounded: it is 1 / K at a = 0, where omega may be 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.lowrank.layers.fused import PositionalFunction


def expert_weights(logits: Tensor, fade: float) -> Tensor:
    """Return omega (..., e) for logits (..., e), in fp32, or in fp64 for fp64 logits. At fade = 1 it is exactly 1."""
    shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (1 - fade) * logits.shape[-1] * shares + fade


def gate(units: Tensor, logits: Tensor, labels: Tensor, fade: float) -> Tensor:
    """Multiply pre-activations (..., H) by the weight of each unit's expert, in the dtype of the units.

    labels: Expert of each unit (H,). logits: Router logits (..., e).
    """
    return _Gate.apply(units, logits, labels, fade)


def idle(units: Tensor, weight: Tensor) -> Tensor:
    """Return `units` unchanged, with a zero gradient for `weight`, so that a faded router stays in the graph.

    An optimiser and a wrapper that waits for all gradients (DistributedDataParallel) then work as before the end of the fade.
    """
    return _Idle.apply(units, weight) if weight.requires_grad and torch.is_grad_enabled() else units


def _members(labels: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (H, e) with 1 where a unit belongs to an expert.

    A product with it is exact, and on a CPU faster in half precision than `index_select`.
    """
    return F.one_hot(labels, experts).to(dtype)


class _Gate(PositionalFunction):
    """Function (u (..., H), z (..., e), labels (H,), a) -> u * omega (..., H). It saves z and the output for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(units: Tensor, logits: Tensor, labels: Tensor, fade: float) -> Tensor:
        members = _members(labels, logits.shape[-1], units.dtype)
        return (expert_weights(logits, fade).to(units.dtype) @ members.t()).mul_(units)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, logits, labels, ctx.fade = inputs
        ctx.save_for_backward(logits, labels, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, gated = ctx.saved_tensors
        fade, experts = ctx.fade, logits.shape[-1]
        omega, members = expert_weights(logits, fade), _members(labels, experts, grad.dtype)
        grad_units = (omega.to(grad.dtype) @ members.t()).mul_(grad) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_units, None, None, None
        shares = logits.softmax(-1, dtype=omega.dtype)
        pulls = ((grad * gated) @ members).to(omega.dtype)
        pulls = pulls * (shares / omega if fade else 1 / experts)
        grad_logits = (1 - fade) * experts * (pulls - shares * pulls.sum(-1, keepdim=True))
        return grad_units, grad_logits.to(logits.dtype), None, None


class _Idle(PositionalFunction):
    """Function (u, weight) -> u. The gradient of weight is zero."""

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
