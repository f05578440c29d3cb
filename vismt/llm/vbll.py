"""VBLL: a classifier whose last layer is a Gaussian posterior, trained through a bound in closed form (no sampling).

    z_c = w_c^T phi + eps_c,   w_c ~ q = N(mu_c, S_c),   eps_c ~ N(0, sigma_c^2)
    prior w_c ~ N(centre_c, p I),   p = prior_scale * 2 / d
    m_c = mu_c^T phi,   v_c = phi^T S_c phi + sigma_c^2
    bound = m_y - logsumexp_c(m_c + v_c / 2)  <=  E log softmax_y(z)  <=  log E softmax_y(z)
    loss  = -mean_b bound + (KL - log prior of the noise) / N                  (variational.py)

Harrison, Willes, Snoek, "Variational Bayesian Last Layers", ICLR 2024, arXiv 2404.11599 (discriminative classification). On
the answer rows of a language model's head it is the last layer of PoLAR-VBLL (arXiv 2604.03388, no code published).

What differs from the package (vbll 0.4.9), on purpose: means may start at given rows with the prior centred there; the
posterior's std starts at 0.03 (the package's 1/d shows no uncertainty for a thousand steps); the noise starts at one std,
not at a random one; predictions are drawn when asked for, not in every forward; covariance="dense" keeps what it says. Defaults
of the priors are the package's. Left out: the Student-t and heteroscedastic heads, the Monte Carlo bound, a bias (append a
column of ones to the features where one is needed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismt.errors import UserError, near
from vismt.llm.predictive import averaged, check_method, draw_logits, probit, uncertainty_scores
from vismt.llm.variational import Dense, Diagonal, LowRank, Spread, VariationalHead, full_precision

COVARIANCES = ("diagonal", "dense", "lowrank")


class VBLLClassifier(VariationalHead):
    """Bayesian last layer on features (b, d) of any backbone, float of any precision; everything inside is fp32.

    Args:
        in_features: d. num_classes: k >= 2. num_train: N, training examples.
        covariance: of each row: "diagonal" (k d numbers), "lowrank" (k d (r + 1)) or "dense" (k d^2: d of a few hundred).
        prior_scale: the prior variance of a weight is prior_scale * 2 / d.
        covariance_rank: r of "lowrank", 3 if None.
        noise_dof, noise_scale: nu = (noise_dof + k + 1) / 2 and s of the noise prior; its mode is s / (noise_dof + k + 1).
        start_std, start_noise: std of every weight's posterior, and of the noise, at the start.
        rows: (k, d), where means start and the prior is centred (rows of a trained linear head, of an LM head's answer
            tokens); None: prior at 0, means from N(0, 2 / d).
        seed: of the start values; the global generator is left alone.

    Rates of their own (train.rates, or `parameter_groups`): `mean`, `spread`, `log_noise`. The posterior's std moves by
    factors, so its rate wants to be some times that of the mean. Raises UserError for values that do not fit.
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
            make_spread(covariance, num_classes, in_features, covariance_rank, device),
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
        """M and v, both (b, k): the logits of an example are independent N(m_c, v_c). features: (b, d) float."""
        x = self._features(features)
        return x @ self.mean.mT, self.spread.quadratic(x) + torch.exp(2 * self.log_noise)

    @full_precision
    def bound(self, features: Tensor, labels: Tensor) -> Tensor:
        """(b,) nats, <= 0: below E log softmax_y(z). features: (b, d) float; labels: (b,) int in [0, k)."""
        mean, variance = self.logit_distribution(features)
        chosen = mean.gather(1, self._labels(labels, len(mean))).squeeze(1)
        return chosen - torch.logsumexp(mean + variance / 2, 1)

    @full_precision
    def predict(
        self,
        features: Tensor,
        samples: int = 20,
        generator: torch.Generator | None = None,
        *,
        method: str = "sample",
    ) -> Tensor:
        """Class probabilities (b, k), fp32. features: (b, d) float, of one pass of the backbone whatever `samples` is.

        method: "sample" averages the softmax of `samples` draws of the k logits; "probit" needs no draw.
        """
        check_method(method)
        mean, variance = self.logit_distribution(features)
        if method == "probit":
            return probit(mean, variance.sqrt())
        return averaged(draw_logits(mean, variance.sqrt(), samples, generator))

    @full_precision
    def uncertainty(
        self, features: Tensor, samples: int = 20, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Scores (b,), each higher the less certain: those of `uncertainty_scores`, and weight_variance.

        weight_variance: phi^T S_c phi, mean over classes, without the noise; it needs no draw.
        """
        mean, variance = self.logit_distribution(features)
        logits = draw_logits(mean, variance.sqrt(), samples, generator)
        own = self.spread.quadratic(self._features(features)).mean(1)
        return {**uncertainty_scores(logits), "weight_variance": own}


def make_spread(covariance: str, rows: int, width: int, rank: int | None, device: Any) -> Spread:
    """The covariance by its name; UserError for another name, or a rank that it cannot have."""
    if covariance not in COVARIANCES:
        raise UserError(f"VBLLClassifier: no covariance '{covariance}'.{near(str(covariance), COVARIANCES)}")
    if covariance != "lowrank":
        if rank is not None:
            raise UserError(f"VBLLClassifier: covariance_rank {rank} with '{covariance}'; only 'lowrank' has a rank.")
        return (Diagonal if covariance == "diagonal" else Dense)(rows, width, device)
    rank = 3 if rank is None else rank
    if not 1 <= rank <= width:
        raise UserError(f"VBLLClassifier: covariance_rank {rank}; it must lie in [1, {width}].")
    return LowRank(rows, width, device, rank)
