"""From a Gaussian over logits to class probabilities, and how uncertain they are.

    sampling   p = mean_s softmax(m + R eps_s), R R^T the covariance of the k logits     probabilities are averaged, not logits
    probit     p = softmax(m / sqrt(1 + pi v / 8)), v their variances                    no draw (MacKay, 1992)

softmax(m + v / 2), which normalises VBLL's bound, is no predictive. Draws are of k logits an example, never of a weight.
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
        raise UserError(f"predict: samples {samples!r}; it must be a whole number, at least 1 (method 'probit' draws none).")
    device = generator.device if generator is not None else mean.device
    noise = torch.randn(samples, *mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + (noise * root if root.ndim == 2 else einsum(root, noise, "b k j, s b j -> s b k"))


def averaged(logits: Tensor) -> Tensor:
    """(s, b, k) logits -> (b, k) mean of the probabilities."""
    return logits.softmax(-1).mean(0)


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    """(b, k) probabilities of mean and variance (b, k) without a draw; exact for neither, close for both."""
    return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), -1)


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
        "least_confidence": 1 - mean.exp().amax(-1), "entropy": entropy, "mutual_information": (entropy - inner).clamp_min(0),
    }
