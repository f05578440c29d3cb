"""The alternating step of PoLAR-VBLL: update the posterior on fixed features, then the backbone under the fixed posterior.

    (a) K steps on (mu, S, sigma) with loss = -mean bound + (KL - log prior) / N, features detached
    (b) the loss of the backbone is -mean bound, the only term of the ELBO that depends on it

Xiang, Li, Lu, arXiv 2604.03388, state that the two alternate; no code is published. K = 1 and one pass of the backbone for
both steps are choices of this implementation. The joint update, `head.loss(features, labels).backward()`, gives the backbone
the same gradient up to the step that (a) has taken. Left out: averaging the gradients of the head over processes; with
several processes, use the joint update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.uncertainty.variational import VariationalHead


def alternating_loss(
    head: VariationalHead, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor, steps: int = 1
) -> Tensor:
    """Update the posterior of `head` (step a) and return the loss of the backbone (step b).

    Args:
        head: a VBLL head.
        optimizer: holds parameters of the head only, without weight decay; `head.parameter_groups` makes its groups.
        features: (b, d) float, with the graph of the backbone.
        labels: (b,) int.
        steps: K >= 1 updates of the posterior in each call, that is in each micro-batch where gradients are accumulated.

    Returns:
        A scalar. Its backward pass reaches the features but no parameter of the head.

    Raises:
        UserError: the optimiser holds other parameters or decays weights, or `steps` is less than 1.
    """
    head_parameters = {id(parameter) for parameter in head.parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay"):
            raise UserError(
                f"alternating: weight decay {group['weight_decay']} on the posterior; set 0, the KL is its prior."
            )
        if not all(id(parameter) in head_parameters for parameter in group["params"]):
            raise UserError(
                "alternating: the optimiser holds parameters that are not the head's; give the head its own optimiser."
            )
    if steps < 1:
        raise UserError(f"alternating: {steps} steps of the head; it must be at least 1.")
    fixed = features.detach()
    with _requires_grad(head, True), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            head.loss(fixed, labels).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with _requires_grad(head, False):
        return -head.bound(features, labels).mean()


@contextmanager
def _requires_grad(module: nn.Module, flag: bool) -> Iterator[None]:
    """Set requires_grad of all parameters within the block and restore it afterwards."""
    flags_before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        module.requires_grad_(flag)
        yield
    finally:
        for parameter, flag_before in flags_before.items():
            parameter.requires_grad_(flag_before)
