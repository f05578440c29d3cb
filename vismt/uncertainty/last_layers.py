"""Heads on the features of the last token, registered by name: a linear head and VBLL.

    head(features (b, d)) -> logits (b, k)
    head.loss(features, labels (b,)) -> scalar
    head.predict(features, ...) -> probabilities (b, k)

A head starts at given rows (k, d), the rows of the LM's output embedding for the answer tokens. The prior of VBLL is centred at
these rows. Otherwise its KL would start at hundreds of nats for each class. The registry holds a dataclass of the options of
each head.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import require_known
from vismt.base.registry import Registry
from vismt.config.typed import arguments
from vismt.uncertainty.laplace import LARGEST, fit_laplace
from vismt.uncertainty.predictive import GaussianHead
from vismt.uncertainty.vbll import VBLLClassifier, VBLLOptions

HEADS: Registry[Any] = Registry("head: no head")


class LinearAnswerHead(nn.Module):
    """Logits features W^T + bias in fp32. W (k, d) starts at `rows`. The bias (k,) exists if the output embedding has one."""

    def __init__(self, rows: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, self.weight, self.bias)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self(features), labels)


@HEADS.register("linear")
@dataclass(frozen=True)
class LinearHead:
    """A linear head has no options."""

    def make(self, rows: Tensor, bias: Tensor | None, num_train: int, seed: int) -> LinearAnswerHead:
        return LinearAnswerHead(rows, bias)


@HEADS.register("vbll")
class VBLLHead(VBLLOptions):
    """A VBLLClassifier that starts at the rows. It has no bias, even if the output embedding has one."""

    def make(self, rows: Tensor, bias: Tensor | None, num_train: int, seed: int) -> VBLLClassifier:
        classes, width = rows.shape
        return VBLLClassifier(width, classes, num_train, rows=rows, seed=seed, device=rows.device, **asdict(self))


def make_head(
    name: str, rows: Tensor, bias: Tensor | None, num_train: int, seed: int, options: dict[str, object]
) -> nn.Module:
    """Return the head registered as `name`.

    Args:
        name: Key of HEADS.
        rows: Start (k, d) of the weight.
        bias: Bias (k,) or None.
        num_train: Number of training rows.
        seed: Seed of the start values.
        options: Further arguments of the head.

    Raises:
        UserError: For an unknown name or option.
    """
    check_head(name, options)
    return HEADS[name](**options).make(rows, bias, num_train, seed)


def is_variational(name: str) -> bool:
    """Return whether the head of this name is trained on the bound of `VBLLClassifier`."""
    return name == "vbll"


def check_head(name: str, options: dict[str, object]) -> None:
    """Raise UserError for an unknown name or option, and for an option of another type."""
    known = [field.name for field in fields(HEADS[name])]
    require_known(f"head: '{name}' has no option", options, known)
    arguments(HEADS[name], options, "head", "options")


@torch.no_grad()
def log_predictive(head: nn.Module, features: Tensor) -> Tensor:
    """Return log-probabilities (b, k) fp64 on the CPU."""
    if isinstance(head, GaussianHead):
        return head.log_probabilities(features).cpu().double()
    return head(features).cpu().double().log_softmax(1)


def laplace_structure(name: str, classes: int, width: int) -> str:
    """Return the structure of the Hessian that Laplace keeps for the head `name` with rows (classes, width)."""
    if is_variational(name):
        return "rows"
    return "full" if classes * width <= LARGEST else "kronecker"


def laplace_head(head: nn.Module, training: list[Tensor], validation: tuple[Tensor, Tensor]) -> nn.Module:
    """Return a Laplace approximation around a trained head.

    For a linear head it keeps the full Hessian, or Kronecker factors if the full Hessian is too large, and chooses the prior
    precision on the validation data. For VBLL, as in PoLAR-VBLL, it keeps the means, the prior and the learned noise, and
    replaces the covariances by the row blocks of the Hessian.

    Args:
        head: A linear head with or without a bias, or a VBLLClassifier.
        training: Features (b, d) of all training rows, in batches.
        validation: Features (n, d) and labels (n,).
    """
    if isinstance(head, VBLLClassifier):
        noise = torch.exp(2 * head.log_noise)
        return fit_laplace(head.mean, training, 1 / head.prior_variance, "rows", noise=noise)
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    laplace = fit_laplace(weight, training, structure=laplace_structure("linear", *weight.shape), bias=bias)
    laplace.tune(*validation)
    return laplace
