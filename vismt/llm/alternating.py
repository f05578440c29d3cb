"""The alternating step of PoLAR-VBLL: the posterior on fixed features, then the backbone under the fixed posterior.

    (a) K steps on (mu, S, sigma) with loss = -mean bound + (KL - log prior) / N, features detached
    (b) the backbone's loss is -mean bound, which is all of the ELBO that depends on it

Xiang, Li, Lu, arXiv 2604.03388, says that the two alternate; no code is published, K = 1 and one pass of the backbone for
both are ours. The joint update, `head.loss(features, labels).backward()`, gives the backbone the same gradient up to the
step that (a) has made. Left out: averaging the head's gradients over processes; with several, use the joint update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.llm.variational import VariationalHead


def alternating_loss(
    head: VariationalHead, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor, steps: int = 1
) -> Tensor:
    """Do (a), return the scalar of (b): its backward reaches the features alone, no parameter of the head.

    optimizer: of the head's parameters only, without weight decay; `head.parameter_groups` makes its groups. features:
    (b, d) with the backbone's graph. labels: (b,) int. steps: K >= 1 for each call, so for each micro-batch where gradients
    are accumulated. Raises UserError for an optimiser that holds other parameters or decays them.
    """
    own = {id(parameter) for parameter in head.parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay"):
            raise UserError(
                f"alternating: weight decay {group['weight_decay']} on the posterior; set 0, the KL is its prior."
            )
        if not all(id(parameter) in own for parameter in group["params"]):
            raise UserError(
                "alternating: the optimiser holds parameters that are not the head's; give the head one of its own."
            )
    if steps < 1:
        raise UserError(f"alternating: {steps} steps of the head; it must be at least 1.")
    fixed = features.detach()
    with _grads(head, True), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            head.loss(fixed, labels).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with _grads(head, False):
        return -head.bound(features, labels).mean()


@contextmanager
def _grads(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether parameters require gradients, for the time of the block."""
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        module.requires_grad_(wanted)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
