"""Weights moved against the loss, within a ball around each tensor: AWP (Wu et al., arXiv 2004.05884) on LoRA factors.

    normalised   nu_w = gamma * ||w||_F * g_w / ||g_w||_F     per tensor, all at once       (AMT's code, and ours)
    plain        nu_w = gamma * g_w                            AMT's Eq. 3, eta_1 = gamma

The released code recovers g_w from a proxy's SGD step, which fp32 rounding destroys for small gradients, and changes the
weights in place before the backward pass. Here g_w is the gradient itself, and the loss at w + nu is reached by a
functional call: parameters are never changed, so there is nothing to restore and no momentum to pollute.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vismt.errors import UserError, near

FORMS = ("normalised", "plain")
SCALE = 1024.0


def weight_perturbation(
    loss: Tensor,
    named_params: Mapping[str, Tensor],
    gamma: float,
    *,
    form: str = "normalised",
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """One ascent step nu of `loss` for each parameter, by name: detached, of the parameter's shape, dtype and device.

    loss: scalar with a graph to the parameters. named_params: leaf tensors that require a gradient, any shape. gamma:
    size, >= 0, of ||nu_w|| / ||w|| per tensor ("normalised"), or the factor of the gradient ("plain"). A parameter that
    the loss does not reach, or whose gradient is zero, gets zeros. Norms are taken in fp32 (fp64 for fp64). Parameters
    and their .grad stay as they are; retain_graph keeps the graph for another backward pass.
    Raises UserError for a negative gamma, an unknown form, or a loss that is no scalar.
    """
    if form not in FORMS:
        raise UserError(f"weight attack: form '{form}'.{near(form, FORMS)}")
    if not 0 <= gamma < float("inf") or loss.ndim:
        raise UserError(
            f"weight attack: gamma {gamma}, loss of shape {tuple(loss.shape)}: need gamma >= 0 and a scalar loss."
        )
    names, parameters = list(named_params), list(named_params.values())
    if not parameters:
        return {}
    # A power of two costs no digit; in half precision it keeps small gradients from vanishing on their way back.
    gradients = torch.autograd.grad(loss * SCALE, parameters, retain_graph=retain_graph, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else _step(parameter, gradient, gamma, form)
        for name, parameter, gradient in zip(names, parameters, gradients)
    }


@torch.no_grad()
def _step(parameter: Tensor, gradient: Tensor, gamma: float, form: str) -> Tensor:
    kind = torch.promote_types(parameter.dtype, torch.float32)
    slope = gradient.to(kind)
    if form == "plain":
        return (gamma / SCALE * slope).to(parameter.dtype)
    largest = slope.abs().max()
    unit = slope / torch.where(
        largest > 0, largest, torch.ones_like(largest)
    )  # squares of tiny gradients would be zero
    length = unit.norm()
    size = gamma * parameter.to(kind).norm() / torch.where(length > 0, length, torch.ones_like(length))
    return (size * unit).to(parameter.dtype)
