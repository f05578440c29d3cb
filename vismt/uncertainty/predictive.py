"""Heads whose logits have a Gaussian distribution: class probabilities and uncertainty scores.

    probit     p_c ~ 1 / sum_j exp(-(m_c - m_j) / sqrt(1 + pi V_cj / 8)),   V_cj the variance of z_c - z_j           no draw
    sample     p = mean_s softmax(m + R eps_s), R R^T the covariance of the k logits     probabilities are averaged, not logits

MacKay's approximation (Neural Computation 4(5), 1992) is for two classes, for which the probit above equals it. The usual
extension to more classes is softmax(m / sqrt(1 + pi v / 8)) with the variances v of single logits. It changes if a constant is
added to all m, ignores correlations, and was further from the mean of many draws in all our measurements. At v = 10 its total
variation was 0.06 against 0.005 for two classes, and 0.13 against 0.08 for five. softmax(m + v / 2), which normalises VBLL's
bound, is not a predictive distribution. Draws are draws of the k logits of an example, never of weights.

Jobs score by the probit, because few draws err more. NLL in nats above the NLL of 20,000 draws, with independent logits of
standard deviation 1, 2 and 4 about means of standard deviation 3 (200 examples):

    classes     probit                    20 draws
    two         0.000, 0.001, 0.000       0.004, 0.012, 0.016
    three       0.001, 0.004, 0.005       0.007, 0.020, 0.040
    five        0.004, 0.014, 0.023       0.010, 0.033, 0.080
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

from vismt.base.errors import UserError, require_known, shown_value

_METHODS = ("sample", "probit")
_PAIRS = 2**25  # numbers of a temporary (b, k, k) of the probit
SMALLEST = torch.finfo(torch.float32).tiny


def full_precision(method: Callable[..., object]) -> Callable[..., Any]:
    """Run a method outside autocast, because v / 2 in a logsumexp and factorisations are not accurate in half precision."""

    @functools.wraps(method)
    def run(self: GaussianHead, *args: object, **options: object) -> Any:
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
        """Return the mean logits (b, k) fp32, as a linear head with these means. features: Features (b, d), float."""
        return self._features(features) @ self.mean.mT

    @abstractmethod
    def mean_and_root(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means (b, k) of the logits and R: (b, k, k) with covariance R R^T, or (b, k) independent std."""

    @full_precision
    def predict(
        self,
        features: Tensor,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        method: str | None = None,
    ) -> Tensor:
        """Return class probabilities (b, k) fp32, averaged over the distribution of the logits.

        Args:
            features: Features (b, d), float, from one pass of the backbone for any number of samples.
            samples: Number of draws of the k logits, over which the softmax is averaged. None means 20.
            generator: Generator of the draws. None for the global generator.
            method: "sample", or "probit", an approximation without draws that is more accurate than 20 draws. None means
                "sample" if `samples` is given, and otherwise "probit".

        Raises:
            UserError: For features that do not fit, `samples` below 1, or an unknown method.
        """
        method = method or ("probit" if samples is None else "sample")
        require_known("predict: no method", [method], _METHODS)
        mean, root = self.mean_and_root(features)
        if method == "probit":
            return probit(mean, root)
        return draw_logits(mean, root, 20 if samples is None else samples, generator).softmax(-1).mean(0)

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return finite log class probabilities (b, k) by the probit. Every job scores a head by them."""
        return self.predict(features).clamp_min(SMALLEST).log()

    @full_precision
    def uncertainty(
        self, features: Tensor, samples: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return scores (b,) by name. Higher scores mean a less certain model. Arguments are as for `predict`.

        With p from `predict`, least_confidence is 1 - max p, in [0, 1 - 1/k], and entropy is H(p) in nats. With draws there is
        also mutual_information, H(p) - mean_s H(p_s) >= 0, the disagreement of the draws.
        """
        mean, root = self.mean_and_root(features)
        if samples is None:
            log_p = probit(mean, root).clamp_min(SMALLEST).log()
        else:
            draws = draw_logits(mean, root, samples, generator).log_softmax(-1)
            log_p = torch.logsumexp(draws, 0) - math.log(samples)
        entropy = -(log_p.exp() * log_p).sum(-1)
        scores = {"least_confidence": 1 - log_p.exp().amax(-1), "entropy": entropy}
        if samples is not None:
            scores["mutual_information"] = (entropy + (draws.exp() * draws).sum(-1).mean(0)).clamp_min(0)
        return scores

    def _features(self, features: Tensor) -> Tensor:
        """Return checked features (b, d) in the precision of the head."""
        if features.ndim != 2 or features.shape[1] != self.mean.shape[1] or not features.is_floating_point():
            raise UserError(
                f"{type(self).__name__}: features are {features.dtype} {tuple(features.shape)}, needed floats "
                f"(b, {self.mean.shape[1]}): pool tokens or take one position first."
            )
        return features.to(self.mean.dtype)

    def _labels(self, labels: Tensor, count: int) -> Tensor:
        """Return checked labels (b, 1) for gather. The range is checked only on the CPU, to avoid a device synchronisation."""
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


def draw_logits(mean: Tensor, root: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw logits (s, b, k) from N(mean, root root^T).

    Exactly s b k normal numbers are drawn. mean: Means (b, k). root: Standard deviations (b, k), or a factor (b, k, k) of the
    covariance. samples: Number s of draws. generator: Generator on any device. None for the global generator of the logits'
    device.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise UserError(
            f"predict: samples {shown_value(samples)}; it must be a whole number, at least 1, or None for the probit."
        )
    device = generator.device if generator is not None else mean.device
    noise = torch.randn(samples, *mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + (noise * root if root.ndim == 2 else einsum(root, noise, "b k j, s b j -> s b k"))


def probit(mean: Tensor, root: Tensor) -> Tensor:
    """Return approximate probabilities (b, k) without a draw. Arguments are as in `draw_logits`."""
    batch = max(1, _PAIRS // mean.shape[1] ** 2)
    parts = []
    for m, r in zip(mean.split(batch), root.split(batch), strict=True):
        covariance = torch.diag_embed(r.square()) if r.ndim == 2 else r @ r.mT
        variance = covariance.diagonal(dim1=1, dim2=2)
        # The value at c = j is unused.
        pairs = (variance.unsqueeze(2) + variance.unsqueeze(1) - 2 * covariance).clamp_min(0)
        against = (m.unsqueeze(1) - m.unsqueeze(2)) / torch.sqrt(1 + math.pi / 8 * pairs)
        parts.append(torch.softmax(-torch.logsumexp(against, 2), 1))
    return torch.cat(parts)
