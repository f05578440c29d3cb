"""VBLL: a classifier with a Gaussian posterior over its last layer, trained on a bound in closed form (no sampling).

    z_c = w_c^T phi + eps_c,   w_c ~ q = N(mu_c, S_c),   eps_c ~ N(0, sigma_c^2)
    prior w_c ~ N(centre_c, p I),   p = prior_scale * 2 / d
    m_c = mu_c^T phi,   v_c = phi^T S_c phi + sigma_c^2
    bound = m_y - logsumexp_c(m_c + v_c / 2)  <=  E log softmax_y(z)  <=  log E softmax_y(z)
    loss  = -mean_b bound + (KL - log prior of the noise) / N                  (variational.py)

Harrison, Willes, Snoek, "Variational Bayesian Last Layers", ICLR 2024, arXiv 2404.11599 (discriminative classification). On
the answer rows of a language model's head it is the last layer of PoLAR-VBLL (arXiv 2604.03388, no code published).

Deliberate differences from the package (vbll 0.4.9): means may start at given rows with the prior centred there; the std of
the posterior starts at 0.03 (the package's 1/d shows no uncertainty for a thousand steps); the noise starts at a fixed std, not
at a random one; `predict` needs no draw, and no forward pass draws; covariance="dense" is dense. Defaults of the
priors are those of the package. Left out: the Student-t and heteroscedastic heads, the Monte Carlo bound, a bias (append a
column of ones to the features where a bias is needed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError, near
from vismt.uncertainty.predictive import draw_logits, predictive, uncertainty_scores
from vismt.uncertainty.variational import (
    Covariance,
    DenseCovariance,
    DiagonalCovariance,
    LowRankCovariance,
    VariationalHead,
    full_precision,
)

COVARIANCES = ("diagonal", "dense", "lowrank")


class VBLLClassifier(VariationalHead):
    """Bayesian last layer on features (b, d) of any backbone, float of any precision; computes in fp32.

    `mean`, `spread` and `log_noise` can have separate learning rates (train.rates, or `parameter_groups`). The std of the
    posterior is learned on a log scale, so its rate should be several times that of the mean.

    Args:
        in_features: d.
        num_classes: k >= 2.
        num_train: N, the number of training examples.
        covariance: of each row: "diagonal" (k d numbers), "lowrank" (k d (r + 1)) or "dense" (k d^2, for d up to a few
            hundred).
        prior_scale: the prior variance of a weight is prior_scale * 2 / d.
        covariance_rank: r of "lowrank", 3 if None.
        noise_dof: nu of the noise prior is (noise_dof + k + 1) / 2.
        noise_scale: s of the noise prior, whose mode is s / (noise_dof + k + 1).
        start_std: std of the posterior of every weight at the start.
        start_noise: std of the noise at the start.
        rows: (k, d), the start values of the means and the centre of the prior (rows of a trained linear head, or of an LM head
            for the answer tokens); None: prior at 0, means from N(0, 2 / d).
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
        covariance: str = "diagonal",
        prior_scale: float = 1.0,
        *,
        covariance_rank: int | None = None,
        noise_dof: float = 1.0,
        noise_scale: float = 1.0,
        start_std: float = 0.03,
        start_noise: float = 0.37,
        rows: Tensor | None = None,
        seed: int = 0,
        device: Any = None,
    ) -> None:
        if num_classes < 2 or in_features < 1:
            raise UserError(
                f"VBLLClassifier: {num_classes} classes on {in_features} features; needed 2 and 1 at least."
            )
        super().__init__(
            make_covariance(covariance, num_classes, in_features, covariance_rank, device),
            num_train,
            num_classes,
            prior_variance=prior_scale * 2 / in_features,
            noise_dof=(noise_dof + num_classes + 1) / 2,
            noise_scale=noise_scale,
            start_std=start_std,
            start_noise=start_noise,
            mean_std=(2 / in_features) ** 0.5,
            rows=rows,
            seed=seed,
            device=device,
        )

    @full_precision
    def logit_distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and v, both (b, k): the logits of an example are independent N(m_c, v_c). features: (b, d) float."""
        x = self._features(features)
        return x @ self.mean.mT, self.spread.quadratic(x) + torch.exp(2 * self.log_noise)

    @full_precision
    def bound(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return a lower bound (b,) <= 0 of E log softmax_y(z) in nats. features: (b, d) float; labels: (b,) int in [0, k)."""
        mean, variance = self.logit_distribution(features)
        chosen = mean.gather(1, self._labels(labels, len(mean))).squeeze(1)
        return chosen - torch.logsumexp(mean + variance / 2, 1)

    @full_precision
    def predict(
        self,
        features: Tensor,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        method: str | None = None,
    ) -> Tensor:
        """Return class probabilities (b, k) fp32.

        Args:
            features: (b, d) float, from one pass of the backbone for any number of samples.
            samples: number of draws of the k logits, over which the softmax is averaged; 20 where None.
            generator: of the draws; None for the global one.
            method: "sample", or "probit", an approximation without draws that 20 draws do not reach
                (vismt/uncertainty/predictive.py); None draws where `samples` is given, and takes the probit elsewhere.

        Raises:
            UserError: features that do not fit, `samples` below 1, or an unknown method.
        """
        mean, variance = self.logit_distribution(features)
        return predictive(mean, variance.sqrt(), samples, generator, method)

    @full_precision
    def uncertainty(
        self, features: Tensor, samples: int = 20, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return scores (b,) by name, higher where the model is less certain: `uncertainty_scores` and weight_variance.

        weight_variance: phi^T S_c phi, mean over classes, without the noise; it needs no draw.
        """
        mean, variance = self.logit_distribution(features)
        logits = draw_logits(mean, variance.sqrt(), samples, generator)
        weight_variance = self.spread.quadratic(self._features(features)).mean(1)
        return {**uncertainty_scores(logits), "weight_variance": weight_variance}


def make_covariance(covariance: str, rows: int, width: int, rank: int | None, device: Any) -> Covariance:
    """Return the covariance called `covariance`; raise UserError for an unknown name or an impossible rank."""
    if covariance not in COVARIANCES:
        raise UserError(f"VBLLClassifier: no covariance '{covariance}'.{near(str(covariance), COVARIANCES)}")
    if covariance != "lowrank":
        if rank is not None:
            raise UserError(f"VBLLClassifier: covariance_rank {rank} with '{covariance}'; only 'lowrank' has a rank.")
        kind = DiagonalCovariance if covariance == "diagonal" else DenseCovariance
        return kind(rows, width, device)
    rank = 3 if rank is None else rank
    if not 1 <= rank <= width:
        raise UserError(f"VBLLClassifier: covariance_rank {rank}; it must lie in [1, {width}].")
    return LowRankCovariance(rows, width, device, rank)
