"""Heads on the features of a last token, by name: a linear one and VBLL.

head(features (b, d)) -> logits (b, k); head.loss(features, labels (b,)) -> scalar; head.predict(features, ...) -> probabilities
(b, k). A head starts at given rows (k, d), the answer tokens' rows of the LM's output embedding, and a VBLL prior is centred
there: else its KL begins at hundreds of nats a class.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError, require_known
from vismt.llm.laplace import LARGEST, fit_laplace
from vismt.llm.variational import GaussianHead
from vismt.llm.vbll import VBLLClassifier

SMALLEST = torch.finfo(torch.float32).tiny


class LinearHead(nn.Module):
    """Logits features W^T, W (k, d) starts at `rows`; with a bias (k,) where the LM's output embedding has one. fp32."""

    def __init__(self, rows: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(features).float(), labels)


def vbll_head(
    rows: Tensor,
    num_train: int,
    seed: int,
    covariance: str = "diagonal",
    prior_scale: float = 1.0,
    covariance_rank: int | None = None,
    noise_dof: float = 1.0,
    noise_scale: float = 1.0,
    start_std: float = 0.03,
    start_noise: float = 0.37,
) -> VBLLClassifier:
    """VBLLClassifier on these rows; it has no bias, whatever the LM has."""
    return VBLLClassifier(
        rows.shape[1],
        len(rows),
        num_train,
        covariance,
        prior_scale,
        covariance_rank=covariance_rank,
        noise_dof=noise_dof,
        noise_scale=noise_scale,
        start_std=start_std,
        start_noise=start_noise,
        rows=rows,
        seed=seed,
        device=rows.device,
    )


HEADS: dict[str, Any] = {"linear": LinearHead, "vbll": vbll_head}
GIVEN = ("rows", "bias", "num_train", "seed")  # what a job gives to a head that asks for it


def make_head(
    name: str, rows: Tensor, bias: Tensor | None, num_train: int, seed: int, options: dict[str, Any]
) -> nn.Module:
    """The head called `name`. num_train: training rows; seed: of start values. UserError for unknown names and options."""
    check_head(name, options)
    asked = inspect.signature(HEADS[name]).parameters
    given = {"rows": rows, "bias": bias, "num_train": num_train, "seed": seed}
    return HEADS[name](**{key: value for key, value in given.items() if key in asked}, **options)


def check_head(name: str, options: dict[str, Any]) -> None:
    """UserError for a name or an option that is not known."""
    require_known("head: no head", [name], HEADS)
    known = [option for option in inspect.signature(HEADS[name]).parameters if option not in GIVEN]
    require_known(f"head: '{name}' has no option", options, known)


@torch.no_grad()
def log_predictive(head: nn.Module, features: Tensor, samples: int = 20) -> Tensor:
    """Log-probabilities (b, k), fp64, on the CPU: of a Gaussian head averaged over draws, the same draws for every batch."""
    if not isinstance(head, GaussianHead):
        return head(features).double().log_softmax(1).cpu()
    drawn = head.predict(features, samples, torch.Generator().manual_seed(0))
    return drawn.double().clamp_min(SMALLEST).log().cpu()


def laplace_structure(name: str, classes: int, width: int) -> str:
    """What of the Hessian Laplace keeps around the head called `name` with rows (classes, width)."""
    if name == "vbll":
        return "rows"
    return "full" if classes * width <= LARGEST else "kronecker"


def check_laplace(head: nn.Module) -> None:
    """UserError for a head that `laplace_head` does not take, to be told before the training."""
    if isinstance(head, LinearHead) and head.bias is not None:
        raise UserError(
            "evaluate.laplace: the LM's output embedding has a bias, which Laplace does not take; set it to false."
        )


def laplace_head(head: nn.Module, training: list[Tensor], validation: tuple[Tensor, Tensor]) -> nn.Module:
    """Laplace after training, on features (b, d) of the training rows.

    Around a linear head: the full Hessian, Kronecker-factored where that is too large, its prior precision chosen on
    validation features (n, d) and labels (n,). Around the means of VBLL, whose covariances it replaces and nothing else: its
    rows, its own prior and its learned noise, as PoLAR-VBLL has it.
    """
    if isinstance(head, VBLLClassifier):
        noise = torch.exp(2 * head.log_noise)
        return fit_laplace(head.mean, training, 1 / head.prior_variance, "rows", noise=noise)
    check_laplace(head)
    laplace = fit_laplace(head.weight, training, structure=laplace_structure("linear", *head.weight.shape))
    laplace.tune(*validation)
    return laplace
