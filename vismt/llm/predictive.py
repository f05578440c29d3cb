"""From a Gaussian over logits to class probabilities, and how uncertain they are.

    sampling   p = mean_s softmax(m + R eps_s), R R^T the covariance of the k logits     probabilities are averaged, not logits
    probit     p_c ~ 1 / sum_j exp(-(m_c - m_j) / sqrt(1 + pi V_cj / 8)),   V_cj the variance of z_c - z_j           no draw

MacKay's approximation (Neural Computation 4(5), 1992) is for two classes, where the probit above is just that. The usual way
to more, softmax(m / sqrt(1 + pi v / 8)) with the variances v of single logits, changes when a constant is added to all
m, ignores correlations, and was further from many draws wherever we measured (two classes: total variation 0.06 against
0.005 at v = 10; five: 0.13 against 0.08). softmax(m + v / 2), which normalises VBLL's bound, is no predictive at all.
Draws are of the k logits of an example, never of weights.
"""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor

from vismt.errors import UserError, near

METHODS = ("sample", "probit")


def draw_logits(mean: Tensor, root: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """(s, b, k) draws. mean: (b, k). root: standard deviations (b, k), or a factor (b, k, k) of the covariance.

    generator: on any device, None for the global one of the logits' device; it gives s b k normal numbers and no more.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise UserError(
            f"predict: samples {samples!r}; it must be a whole number, at least 1 (method 'probit' draws none)."
        )
    device = generator.device if generator is not None else mean.device
    noise = torch.randn(samples, *mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + (noise * root if root.ndim == 2 else einsum(root, noise, "b k j, s b j -> s b k"))


def averaged(logits: Tensor) -> Tensor:
    """(s, b, k) logits -> (b, k) mean of the probabilities."""
    return logits.softmax(-1).mean(0)


def probit(mean: Tensor, root: Tensor) -> Tensor:
    """(b, k) probabilities without a draw, an approximation; works on (b, k, k). Arguments as `draw_logits`."""
    if root.ndim == 2:
        variance, covariance = root.square(), 0.0
    else:
        covariance = root @ root.mT
        variance = covariance.diagonal(dim1=1, dim2=2)
    pairs = (variance.unsqueeze(2) + variance.unsqueeze(1) - 2 * covariance).clamp_min(0)  # of c = j it does not count
    against = (mean.unsqueeze(1) - mean.unsqueeze(2)) / torch.sqrt(1 + math.pi / 8 * pairs)
    return torch.softmax(-torch.logsumexp(against, 2), 1)


def check_method(method: str) -> None:
    """UserError for a predictive that is not known."""
    if method not in METHODS:
        raise UserError(f"predict: no method '{method}'.{near(str(method), METHODS)}")


def uncertainty_scores(logits: Tensor) -> dict[str, Tensor]:
    """Scores (b,) of logits (s, b, k); all are higher the less certain the model, so that far-off data score high.

    least_confidence: 1 - max p, in [0, 1 - 1/k]. entropy: H(p) in nats. mutual_information: H(p) - mean_s H(p_s) >= 0, how
    much the draws disagree. p is the mean over draws.
    """
    logs = logits.log_softmax(-1)
    mean = torch.logsumexp(logs, 0) - math.log(len(logs))
    entropy = -(mean.exp() * mean).sum(-1)
    inner = -(logs.exp() * logs).sum(-1).mean(0)
    return {
        "least_confidence": 1 - mean.exp().amax(-1),
        "entropy": entropy,
        "mutual_information": (entropy - inner).clamp_min(0),
    }
