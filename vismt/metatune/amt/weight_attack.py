"""A step of weights that raises the loss, within a ball around each tensor: AWP (Wu et al., arXiv 2004.05884) on LoRA factors.

    normalised   nu_w = gamma * ||w||_F * g_w / ||g_w||_F     for each tensor, all at once (AMT's code, the default)
    plain        nu_w = gamma * g_w                            AMT's Eq. 3, eta_1 = gamma

The released code recovers g_w from the SGD step of a proxy, which fp32 rounding destroys for small gradients, and changes the
weights in place before the backward pass. Here g_w is the gradient itself, and a functional call computes the loss at w + nu.
Parameters are never changed, so there is nothing to restore and momentum is not affected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known

_FORMS = ("normalised", "plain")
_SCALE = 1024.0


def weight_perturbation(
    loss: Tensor,
    named_params: Mapping[str, Tensor],
    gamma: float,
    *,
    form: str = "normalised",
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Return an ascent step nu of `loss` for each parameter. Parameters and their .grad are not changed.

    Args:
        loss: Scalar with a graph to the parameters.
        named_params: Leaf tensors that require a gradient, of any shape, by name.
        gamma: Size of the step, >= 0: ||nu_w|| / ||w|| of each tensor ("normalised"), or the factor of the gradient ("plain").
        form: "normalised" or "plain" (equations in this file's header).
        retain_graph: Whether to keep the graph for another backward pass.

    Returns:
        nu by name, detached, in the shape, dtype and device of the parameter. It is zero for a parameter that the loss does not
        reach or whose gradient is zero. Norms are computed in fp32 (in fp64 for fp64).

    Raises:
        UserError: If gamma is negative, the form is unknown, or the loss is not a scalar.
    """
    require_known("weight attack: form", [form], _FORMS)
    if not 0 <= gamma < float("inf") or loss.ndim:
        raise UserError(
            f"weight attack: gamma {gamma}, loss of shape {tuple(loss.shape)}: need gamma >= 0 and a scalar loss."
        )
    names, parameters = list(named_params), list(named_params.values())
    if not parameters:
        return {}
    # A power of two changes no digit. In half precision it keeps small gradients from underflowing.
    gradients = torch.autograd.grad(loss * _SCALE, parameters, retain_graph=retain_graph, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else _step(parameter, gradient, gamma, form)
        for name, parameter, gradient in zip(names, parameters, gradients)
    }


@torch.no_grad()
def _step(parameter: Tensor, gradient: Tensor, gamma: float, form: str) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    slope = gradient.to(dtype)
    if form == "plain":
        return (gamma / _SCALE * slope).to(parameter.dtype)
    largest = slope.abs().max()
    # Divided by the largest entry first: the squares of tiny gradients would be zero.
    unit = slope / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = unit.norm()
    size = gamma * parameter.to(dtype).norm() / torch.where(length > 0, length, torch.ones_like(length))
    return (size * unit).to(parameter.dtype)
