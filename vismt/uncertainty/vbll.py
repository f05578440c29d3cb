"""VBLL: a classifier with a Gaussian posterior over its last layer, trained on a bound in closed form, without sampling.

    z_c = w_c^T phi + eps_c,   w_c ~ q = N(mu_c, S_c),   eps_c ~ N(0, sigma_c^2)
    prior w_c ~ N(centre_c, p I) for each of the k rows of width d,   p = prior_scale * 2 / d
    m_c = mu_c^T phi,   v_c = phi^T S_c phi + sigma_c^2
    bound = m_y - logsumexp_c(m_c + v_c / 2)  <=  E log softmax_y(z)  <=  log E softmax_y(z)
    KL = 1/2 sum_c [ (|mu_c - centre_c|^2 + tr S_c) / p + d log p - logdet S_c - d ]
    log prior of the noise = nu sum_c (-2 log sigma_c) - s/2 sum_c sigma_c^-2        its mode is sigma^2 = s / (2 nu)
    loss = -mean_b bound + (KL - log prior of the noise) / N                         N training examples, not batches

Harrison, Willes, Snoek, "Variational Bayesian Last Layers", ICLR 2024, arXiv 2404.11599 (discriminative classification). On
the answer rows of a language model's head it is the last layer of PoLAR-VBLL (arXiv 2604.03388, no code published).

The tests compare with the numbers of the package (vbll 0.4.9). Deliberate differences:

- Means may start at given rows, and the prior is then centred there.
- The std of the posterior starts at 0.03. The package's 1/d shows no uncertainty for a thousand steps.
- The noise starts at a fixed std, not at a random std.
- `predict` needs no draw, and no forward pass draws.
- covariance="dense" is dense.
- The constant -k d / 2 of the KL is kept, so that KL is 0 at the prior. The loss differs by k d / (2 N).
- `log_std` is a log standard deviation in all three covariances. In the package it is a log variance in the low-rank covariance.
- The logdet of a low-rank S is log det D + sum log(1 + eig(U^T D^-1 U)) on the small matrix. It cannot underflow as a
determinant can,
  and creates no tensor on another device.

The defaults of the priors are the package's. Left out: the generative, Student-t and heteroscedastic heads, the Monte Carlo
bound, and a bias. If a bias is needed, append a column of ones to the features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known
from vismt.uncertainty.predictive import GaussianHead, full_precision


class Covariance(nn.Module, ABC):
    """The covariances S_c of k independent rows of width d. log_std: Log standard deviations (k, d)."""

    def __init__(self, rows: int, width: int, device: Any) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.empty(rows, width, device=device))

    def start(self, std: float, generator: torch.Generator) -> None:
        """Set every standard deviation to `std`, with correlations of 0 or close to 0."""
        nn.init.constant_(self.log_std, math.log(std))

    @abstractmethod
    def quadratic(self, x: Tensor) -> Tensor:
        """Return x^T S_c x (b, k) for x (b, d), without forming S_c."""

    @abstractmethod
    def variances(self) -> Tensor:
        """Return the diagonals (k, d) of S_c."""

    def logdet(self) -> Tensor:
        """Return log det S_c (k,), computed from a triangular root whose diagonal is exp(log_std)."""
        return 2 * self.log_std.sum(1)


class DiagonalCovariance(Covariance):
    """S_c = diag(std_c^2), k d numbers."""

    def quadratic(self, x: Tensor) -> Tensor:
        return x.square() @ self.variances().mT

    def variances(self) -> Tensor:
        return torch.exp(2 * self.log_std)


class DenseCovariance(Covariance):
    """S_c = L_c L_c^T, with exp(log_std) as the diagonal of L_c. k d^2 numbers, for small d.

    lower: Matrices (k, d, d), of which only the entries below the diagonal are used.
    """

    def __init__(self, rows: int, width: int, device: Any) -> None:
        super().__init__(rows, width, device)
        self.lower = nn.Parameter(torch.empty(rows, width, width, device=device))

    def start(self, std: float, generator: torch.Generator) -> None:
        super().start(std, generator)
        nn.init.zeros_(self.lower)

    def factor(self) -> Tensor:
        """Return L (k, d, d)."""
        return self.lower.tril(-1) + torch.diag_embed(self.log_std.exp())

    def quadratic(self, x: Tensor) -> Tensor:
        return einsum(x, self.factor(), "b d, k d e -> b k e").square().sum(-1)

    def variances(self) -> Tensor:
        return self.factor().square().sum(-1)


class LowRankCovariance(Covariance):
    """S_c = U_c U_c^T + diag(std_c^2), k d (r + 1) numbers. factor: Factor U (k, d, r)."""

    def __init__(self, rows: int, width: int, device: Any, rank: int) -> None:
        super().__init__(rows, width, device)
        self.factor = nn.Parameter(torch.empty(rows, width, rank, device=device))

    def start(self, std: float, generator: torch.Generator) -> None:
        super().start(std, generator)
        # Every term is quadratic in U, so the gradient at U = 0 would be 0 and U would not train.
        with torch.no_grad():
            self.factor.copy_(torch.randn(self.factor.shape, generator=generator) * 0.1 * std)

    def quadratic(self, x: Tensor) -> Tensor:
        projected = einsum(x, self.factor, "b d, k d r -> b k r")
        return x.square() @ torch.exp(2 * self.log_std).mT + projected.square().sum(-1)

    def variances(self) -> Tensor:
        return torch.exp(2 * self.log_std) + self.factor.square().sum(-1)

    def logdet(self) -> Tensor:
        scaled = self.factor * torch.exp(-self.log_std).unsqueeze(-1)
        excess = torch.linalg.eigvalsh(scaled.mT @ scaled).clamp_min(0)
        return super().logdet() + torch.log1p(excess).sum(1)


COVARIANCES = ("diagonal", "dense", "lowrank")


@dataclass(frozen=True)
class VBLLOptions:
    """The settings of a VBLL head beside its sizes.

    Args:
        covariance: Form of the covariance of each row: "diagonal" (k d numbers), "lowrank" (k d (r + 1)) or "dense" (k d^2, for
            d up to a few hundred).
        prior_scale: Scale of the prior. The prior variance of a weight is prior_scale * 2 / d.
        covariance_rank: Rank r of "lowrank". None means 3.
        noise_dof: Degrees of freedom of the noise prior, with nu = (noise_dof + k + 1) / 2.
        noise_scale: Scale s of the noise prior, whose mode is s / (noise_dof + k + 1).
        start_std: Std of the posterior of every weight at the start.
        start_noise: Std of the noise at the start.
    """

    covariance: str = "diagonal"
    prior_scale: float = 1.0
    covariance_rank: int | None = None
    noise_dof: float = 1.0
    noise_scale: float = 1.0
    start_std: float = 0.03
    start_noise: float = 0.37

    def make_covariance(self, rows: int, width: int, device: object) -> Covariance:
        """Return the covariance with this name. Raise UserError for an unknown name or an impossible rank."""
        require_known("VBLLClassifier: no covariance", [self.covariance], COVARIANCES)
        if self.covariance == "lowrank":
            rank = 3 if self.covariance_rank is None else self.covariance_rank
            if not 1 <= rank <= width:
                raise UserError(f"VBLLClassifier: covariance_rank {rank}; it must lie in [1, {width}].")
            return LowRankCovariance(rows, width, device, rank)
        if self.covariance_rank is not None:
            raise UserError(
                f"VBLLClassifier: covariance_rank {self.covariance_rank} with '{self.covariance}'; only 'lowrank' has a rank."
            )
        kind = DiagonalCovariance if self.covariance == "diagonal" else DenseCovariance
        return kind(rows, width, device)


class VBLLClassifier(GaussianHead):
    """Bayesian last layer on features (b, d) of any backbone, float of any precision. It computes in fp32.

    `mean`, `spread` (the covariance of the posterior) and `log_noise` can have separate learning rates (train.rates, or
    `parameter_groups`). The std of the posterior is learned on a log scale, so its rate should be several times the rate of the
    mean.

    Args:
        in_features: Number d of features.
        num_classes: Number k of classes, at least 2.
        num_train: Number N of training examples.
        covariance: "diagonal", "lowrank" or "dense", as in `VBLLOptions`.
        prior_scale: Scale of the prior. The prior variance of a weight is prior_scale * 2 / d.
        rows: Start values (k, d) of the means and centre of the prior (rows of a trained linear head, or of an LM head for the
            answer tokens). None for a prior at 0 and means from N(0, 2 / d).
        seed: Seed of the start values. The global generator is not used.
        device: Device of the parameters.
        **options: Further fields of `VBLLOptions`.

    Raises:
        UserError: For values that do not fit.
    """

    own_prior = True  # No weight decay: the KL pulls towards the prior, and a decayed log_std would grow to std = 1.
    centre: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_train: int,
        covariance: str = "diagonal",
        prior_scale: float = 1.0,
        *,
        rows: Tensor | None = None,
        seed: int = 0,
        device: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_classes < 2 or in_features < 1:
            raise UserError(
                f"VBLLClassifier: {num_classes} classes on {in_features} features; needed 2 and 1 at least."
            )
        need_whole("VBLLClassifier: num_train", num_train)
        self.options = VBLLOptions(covariance, prior_scale, **options)
        self.spread = self.options.make_covariance(num_classes, in_features, device)
        self.num_train = num_train
        self.prior_variance = self.options.prior_scale * 2 / in_features
        self.noise_dof = (self.options.noise_dof + num_classes + 1) / 2
        positive = {
            "prior_scale": self.prior_variance,
            "noise_dof": self.noise_dof,
            "noise_scale": self.options.noise_scale,
            "start_std": self.options.start_std,
            "start_noise": self.options.start_noise,
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UserError(f"VBLLClassifier: {name} leads to {value}; it must be positive.")
        shape = (num_classes, in_features)
        if rows is not None and tuple(rows.shape) != shape:
            raise UserError(
                f"VBLLClassifier: rows are {tuple(rows.shape)}, needed {shape}: one row of the features' width per class."
            )
        self.mean_std = (2 / in_features) ** 0.5 if rows is None else 0.0
        self.mean = nn.Parameter(torch.empty(shape, device=device))
        self.log_noise = nn.Parameter(torch.empty(num_classes, device=device))
        self.register_buffer("centre", torch.zeros(shape, device=device))
        if rows is not None:
            self.centre.copy_(rows.detach())
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Set the start values, which are a function of the seed: means at the given rows, or from N(0, mean_std^2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.mean.copy_(self.mean_std * torch.randn(self.mean.shape, generator=generator)).add_(self.centre)
        nn.init.constant_(self.log_noise, math.log(self.options.start_noise))
        self.spread.start(self.options.start_std, generator)

    @full_precision
    def logit_distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and v, both (b, k). The logits of an example are independent N(m_c, v_c). features: (b, d), float."""
        x = self._features(features)
        return x @ self.mean.mT, self.spread.quadratic(x) + torch.exp(2 * self.log_noise)

    def mean_and_root(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.logit_distribution(features)
        return mean, variance.sqrt()

    @full_precision
    def uncertainty(
        self, features: Tensor, samples: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the scores of `GaussianHead.uncertainty` and weight_variance.

        weight_variance is phi^T S_c phi, the mean over classes, without the noise. It needs no draw.
        """
        weight_variance = self.spread.quadratic(self._features(features)).mean(1)
        return {**super().uncertainty(features, samples, generator), "weight_variance": weight_variance}

    @full_precision
    def bound(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return a lower bound (b,) <= 0 of E log softmax_y(z) in nats. features: (b, d), float. labels: (b,) in [0, k)."""
        mean, variance = self.logit_distribution(features)
        chosen = mean.gather(1, self._labels(labels, len(mean))).squeeze(1)
        return chosen - torch.logsumexp(mean + variance / 2, 1)

    @full_precision
    def kl(self) -> Tensor:
        """Return KL(q, prior) in nats, a scalar >= 0 that is 0 if q is the prior."""
        p = self.prior_variance
        squares = (self.mean - self.centre).square().sum() + self.spread.variances().sum()
        return 0.5 * (squares / p + self.mean.numel() * (math.log(p) - 1) - self.spread.logdet().sum())

    @full_precision
    def noise_log_prior(self) -> Tensor:
        """Return the log density of the noise variances up to a constant, a scalar."""
        precisions = torch.exp(-2 * self.log_noise).sum()
        return -2 * self.noise_dof * self.log_noise.sum() - 0.5 * self.options.noise_scale * precisions

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the negative ELBO for each training example, a scalar. features: (b, d), float. labels: (b,), int."""
        return (self.kl() - self.noise_log_prior()) / self.num_train - self.bound(features, labels).mean()

    def parameter_groups(self, lr: float, spread_lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups without weight decay: mean and noise at `lr`, the posterior's covariance at `spread_lr`."""
        return [
            {"params": [self.mean, self.log_noise], "lr": lr, "weight_decay": 0.0},
            {"params": list(self.spread.parameters()), "lr": spread_lr, "weight_decay": 0.0},
        ]


def alternating_loss(
    head: VBLLClassifier, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor, steps: int = 1
) -> Tensor:
    """Take the alternating step of PoLAR-VBLL: update the posterior of `head`, and return the loss of the backbone under it.

        (a) K steps on (mu, S, sigma) with loss = -mean bound + (KL - log prior) / N, features detached
        (b) the loss of the backbone is -mean bound, the only term of the ELBO that depends on it

    Xiang, Li, Lu, arXiv 2604.03388, state that both steps alternate. No code is published. K = 1, and one pass of the backbone
    for both steps, are choices of this implementation. The joint update, `head.loss(features, labels).backward()`, gives the
    backbone the same gradient up to the step that (a) has taken. Gradients of the head are not averaged over processes. With
    several processes, use the joint update.

    Args:
        head: A VBLL head.
        optimizer: Optimiser of only the head's parameters, without weight decay. `head.parameter_groups` makes its groups.
        features: Features (b, d), float, with the graph of the backbone.
        labels: Integers (b,).
        steps: Number K >= 1 of updates of the posterior in each call, which is each micro-batch if gradients are accumulated.

    Returns:
        A scalar. Its backward pass reaches the features but no parameter of the head.

    Raises:
        UserError: If the optimiser holds other parameters or decays weights, or `steps` is less than 1.
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
