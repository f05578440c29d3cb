"""Gaussian rows with a learned covariance, and the common part of the two VBLL heads: fp32, KL, prior of the noise, loss.

    q = prod_c N(mu_c, S_c)    prior N(centre_c, p I) for each of the k rows of width d
    KL = 1/2 sum_c [ (|mu_c - centre_c|^2 + tr S_c) / p + d log p - logdet S_c - d ]
    log prior of the noise = nu sum_j (-2 log sigma_j) - s/2 sum_j sigma_j^-2        its mode is sigma^2 = s / (2 nu)
    loss = -mean_b bound + (KL - log prior of the noise) / N                         N training examples, not batches

VBLL, Harrison et al., ICLR 2024, arXiv 2404.11599; checked against the numbers of its package, vbll 0.4.9. The package drops
the constant -k d / 2 of the KL; here it is kept, so that KL is 0 at the prior (the loss differs by k d / (2 N)). `log_std`
is a log standard deviation in all three covariances; the package interprets it as a log variance in the low-rank one.
The logdet of a low-rank S is log det D + sum log(1 + eig(U^T D^-1 U)) on the small matrix, which cannot underflow as a
determinant can and creates no tensor on another device.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from vismt.base.errors import UserError

SMALLEST = torch.finfo(torch.float32).tiny


class Covariance(nn.Module, ABC):
    """The covariances S_c of k independent rows of width d. log_std: (k, d)."""

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

    @abstractmethod
    def logdet(self) -> Tensor:
        """Return log det S_c (k,)."""


class DiagonalCovariance(Covariance):
    """S_c = diag(std_c^2): k d numbers."""

    def quadratic(self, x: Tensor) -> Tensor:
        return x.square() @ self.variances().mT

    def variances(self) -> Tensor:
        return torch.exp(2 * self.log_std)

    def logdet(self) -> Tensor:
        return 2 * self.log_std.sum(1)


class DenseCovariance(Covariance):
    """S_c = L_c L_c^T, L_c with the diagonal exp(log_std): k d^2 numbers, for small d.

    lower: (k, d, d); only the entries below the diagonal are used.
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

    def logdet(self) -> Tensor:
        return 2 * self.log_std.sum(1)


class LowRankCovariance(Covariance):
    """S_c = U_c U_c^T + diag(std_c^2): k d (r + 1) numbers. factor: U (k, d, r)."""

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
        return 2 * self.log_std.sum(1) + torch.log1p(excess).sum(1)


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method of a head outside autocast: v / 2 in a logsumexp and factorisations are not accurate in half precision."""

    @functools.wraps(method)
    def run(self: GaussianHead, *args: Any, **options: Any) -> Any:
        device_type = self.mean.device.type
        available = torch.amp.is_autocast_available(device_type)
        with torch.autocast(device_type, enabled=False) if available else nullcontext():
            return method(self, *args, **options)

    return run


class GaussianHead(nn.Module, ABC):
    """A head with means (k, d) that stays in fp32 (or fp64) when the surrounding model is converted to half precision."""

    mean: Tensor

    @full_precision
    def forward(self, features: Tensor) -> Tensor:
        """Return the mean logits (b, k) fp32, those of a linear head with these means. features: (b, d) float."""
        return self._features(features) @ self.mean.mT

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor:
        """Return class probabilities (b, k), averaged over the posterior without draws."""

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return log class probabilities (b, k), finite; every job scores a head by them."""
        return self.predict(features).clamp_min(SMALLEST).log()

    def _features(self, features: Tensor) -> Tensor:
        """Return checked features (b, d) in the precision of the head."""
        if features.ndim != 2 or features.shape[1] != self.mean.shape[1] or not features.is_floating_point():
            raise UserError(
                f"{type(self).__name__}: features are {features.dtype} {tuple(features.shape)}, needed floats "
                f"(b, {self.mean.shape[1]}): pool tokens or take one position first."
            )
        return features.to(self.mean.dtype)

    def _labels(self, labels: Tensor, count: int) -> Tensor:
        """Return checked labels (b, 1) for gather; the range is checked on the CPU only, to avoid a device synchronisation."""
        what, k = type(self).__name__, len(self.mean)
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise UserError(
                f"{what}: labels are {labels.dtype} {tuple(labels.shape)}, needed whole numbers ({count},)."
            )
        if labels.device.type == "cpu" and count and not 0 <= int(labels.min()) <= int(labels.max()) < k:
            raise UserError(
                f"{what}: labels range over [{int(labels.min())}, {int(labels.max())}], needed [0, {k - 1}]."
            )
        return labels.long().unsqueeze(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_half = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if is_half else moved

        return super()._apply(keep_precision, recurse)


class VariationalHead(GaussianHead):
    """Rows N(mean_c, S_c) over features of width d, with learned noise.

    A subclass gives the prior variance p, nu (noise_dof), the number of noise variances, the standard deviation of the start
    values of the means without rows (mean_std), and the bound. Parameters by name: `mean` (k, d), `spread.*` (the covariance of
    the posterior), `log_noise`.
    """

    own_prior = True  # no weight decay: the KL pulls towards the prior, and a decayed log_std would grow to std = 1
    centre: Tensor

    def __init__(
        self,
        spread: Covariance,
        num_train: int,
        noise: int,
        *,
        prior_variance: float,
        noise_dof: float,
        noise_scale: float,
        start_std: float,
        start_noise: float,
        mean_std: float,
        rows: Tensor | None,
        seed: int,
        device: Any,
    ) -> None:
        super().__init__()
        what = type(self).__name__
        if isinstance(num_train, bool) or not isinstance(num_train, int) or num_train < 1:
            raise UserError(f"{what}: num_train {num_train!r}; it must be the number of training examples, at least 1.")
        positive = {
            "prior_scale": prior_variance,
            "noise_dof": noise_dof,
            "noise_scale": noise_scale,
            "start_std": start_std,
            "start_noise": start_noise,
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UserError(f"{what}: {name} leads to {value}; it must be positive.")
        shape = tuple(spread.log_std.shape)
        if rows is not None and tuple(rows.shape) != shape:
            raise UserError(
                f"{what}: rows are {tuple(rows.shape)}, needed {shape}: one row of the features' width per class."
            )
        self.num_train = num_train
        self.prior_variance = prior_variance
        self.noise_dof = noise_dof
        self.noise_scale = noise_scale
        self.start_std = start_std
        self.start_noise = start_noise
        self.mean_std = mean_std if rows is None else 0.0
        self.spread = spread
        self.mean = nn.Parameter(torch.empty(shape, device=device))
        self.log_noise = nn.Parameter(torch.empty(noise, device=device))
        self.register_buffer("centre", torch.zeros(shape, device=device))
        if rows is not None:
            self.centre.copy_(rows.detach())
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Set the start values, a function of the seed: means at the given rows, or from N(0, mean_std^2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.mean.copy_(self.mean_std * torch.randn(self.mean.shape, generator=generator)).add_(self.centre)
        nn.init.constant_(self.log_noise, math.log(self.start_noise))
        self.spread.start(self.start_std, generator)

    @abstractmethod
    def bound(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return a lower bound (b,) of the expected log-likelihood of each example under q."""

    @full_precision
    def kl(self) -> Tensor:
        """Return KL(q, prior) in nats, a scalar >= 0 that is 0 where q is the prior."""
        p = self.prior_variance
        squares = (self.mean - self.centre).square().sum() + self.spread.variances().sum()
        return 0.5 * (squares / p + self.mean.numel() * (math.log(p) - 1) - self.spread.logdet().sum())

    @full_precision
    def noise_log_prior(self) -> Tensor:
        """Return the log density of the noise variances up to a constant, a scalar."""
        precisions = torch.exp(-2 * self.log_noise).sum()
        return -2 * self.noise_dof * self.log_noise.sum() - 0.5 * self.noise_scale * precisions

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the negative ELBO per training example, a scalar. features: (b, d) float; labels: (b,) int."""
        return (self.kl() - self.noise_log_prior()) / self.num_train - self.bound(features, labels).mean()

    def parameter_groups(self, lr: float, spread_lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups without weight decay: mean and noise at `lr`, the posterior's covariance at `spread_lr`."""
        return [
            {"params": [self.mean, self.log_noise], "lr": lr, "weight_decay": 0.0},
            {"params": list(self.spread.parameters()), "lr": spread_lr, "weight_decay": 0.0},
        ]
