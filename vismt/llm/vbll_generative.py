"""Generative VBLL: Gaussian classes with uncertain means; the predictive distribution is exact and needs no draw.

    phi | y = c ~ N(mu_c, Sigma),  Sigma = diag(sigma^2) shared,   mu_c ~ q = N(m_c, S_c), S_c diagonal,   classes equally likely
    bound = log N(phi; m_y, Sigma) - 1/2 tr(Sigma^-1 S_y) - logsumexp_c log N(phi; m_c, Sigma + S_c)
    p(y | phi) = softmax_c log N(phi; m_c, Sigma + S_c)
    loss as in variational.py with the prior variance p = prior_scale and nu = (noise_dof + d + 1) / 2

Harrison, Willes, Snoek, ICLR 2024, arXiv 2404.11599; the other covariances raise an error in the package, so only the diagonal
one is implemented. The losses of the two heads are not comparable. Left out: learned class frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.uncertainty.variational import DiagonalCovariance, VariationalHead, full_precision


class GenerativeVBLL(VariationalHead):
    """Gaussian classes on features (b, d); computes in fp32.

    Args:
        in_features: d.
        num_classes: k >= 2.
        num_train: N, the number of training examples.
        prior_scale: the prior variance of a class mean.
        noise_dof: nu of the noise prior is (noise_dof + d + 1) / 2.
        noise_scale: s of the noise prior.
        start_std: std of the posterior of every class mean at the start.
        start_noise: std of the features about their class mean at the start; set it close to that of the data.
        rows: (k, d) class means, the start values and the centre of the prior; None: prior at 0, means from N(0, 0.1^2).
        seed: of the start values; the global generator is left alone.
        device: of the parameters.

    Raises:
        UserError: values that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_train: int,
        prior_scale: float = 1.0,
        *,
        noise_dof: float = 1.0,
        noise_scale: float = 1.0,
        start_std: float = 0.03,
        start_noise: float = 1.0,
        rows: Tensor | None = None,
        seed: int = 0,
        device: Any = None,
    ) -> None:
        if num_classes < 2 or in_features < 1:
            raise UserError(
                f"GenerativeVBLL: {num_classes} classes on {in_features} features; needed 2 and 1 at least."
            )
        super().__init__(
            DiagonalCovariance(num_classes, in_features, device),
            num_train,
            in_features,
            prior_variance=prior_scale,
            noise_dof=(noise_dof + in_features + 1) / 2,
            noise_scale=noise_scale,
            start_std=start_std,
            start_noise=start_noise,
            mean_std=0.1,
            rows=rows,
            seed=seed,
            device=device,
        )

    @full_precision
    def forward(self, features: Tensor) -> Tensor:
        """Return log N(phi; m_c, Sigma + S_c) (b, k) fp32, unnormalised log-probabilities. features: (b, d) float."""
        x, means = self._centred(features)
        variance = torch.exp(2 * self.log_noise) + self.spread.variances()
        # (x - m)^2 / t as three products, without a (b, k, d) tensor; centring keeps the cancellation small.
        squares = x.square() @ (1 / variance).mT - 2 * x @ (means / variance).mT + (means.square() / variance).sum(1)
        return -0.5 * (squares + variance.log().sum(1) + x.shape[1] * math.log(2 * math.pi))

    @full_precision
    def bound(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return a lower bound (b,) of the expected log p(y | phi, mu) in nats.

        features: (b, d) float; labels: (b,) int in [0, k).
        """
        x, means = self._centred(features)
        label = self._labels(labels, len(x)).squeeze(1)
        precision = torch.exp(-2 * self.log_noise)
        squares = (x - means[label]).square() + self.spread.variances()[label]
        joint = -0.5 * (squares @ precision + 2 * self.log_noise.sum() + x.shape[1] * math.log(2 * math.pi))
        return joint - torch.logsumexp(self(features), 1)

    def predict(self, features: Tensor) -> Tensor:
        """Return class probabilities (b, k) fp32, exact under q. features: (b, d) float."""
        return self(features).softmax(1)

    def uncertainty(self, features: Tensor) -> dict[str, Tensor]:
        """Return scores (b,) by name, higher where the model is less certain.

        least_confidence: 1 - max p. entropy: of p, in nats. surprise: -log p(phi).
        """
        joint = self(features)
        logs = joint.log_softmax(1)
        return {
            "least_confidence": 1 - logs.exp().amax(1),
            "entropy": -(logs.exp() * logs).sum(1),
            "surprise": math.log(joint.shape[1]) - torch.logsumexp(joint, 1),
        }

    def _centred(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and class means relative to the mean of means, a constant; densities and gradients do not change."""
        middle = self.mean.detach().mean(0)
        return self._features(features) - middle, self.mean - middle
