"""VBLL probe: a Bayesian last layer on a task's support features (vismt/llm/vbll.py), whose answers average over its posterior.

With u, w of linear_probe.py and x = (sqrt(d) u, 1), so that a coordinate of x has mean square 1,

    q = argmin  -1/n sum_i w_i bound(x_i, y_i) + (KL(q, prior) - log prior of the noise) / n
    logits = log mean_s softmax(m(x) + sqrt(v(x)) eps_s)        eps_s: the same SAMPLES draws for every query

by STEPS steps of Adam over the whole support, from means of 0, the mode of the prior. So the answer depends on the support alone,
and its gradient reaches the query images. The posterior matters most where the support is small: with one image a class the data
fix one direction for each class, and all others keep the prior.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.llm.heads import SMALLEST
from vismt.llm.vbll import VBLLClassifier
from vismt.metatune.features import features
from vismt.metatune.linear_probe import LinearProbe
from vismt.metatune.protocol import FewShotModel

SAMPLES = 20
STEPS = 200
RATE = 0.05


class VBLLProbe(LinearProbe):
    """Prototypes replaced by a Bayesian last layer (equations in this file's header); options: further ones of the head."""

    def __init__(self, proto: FewShotModel, **options: Any) -> None:
        super().__init__(proto)
        self.options = options

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's means as W (N, d) and b (N,)."""
        mean = self.fit_head(inputs, labels, weights).mean.detach().to(inputs)
        return mean[:, :-1] * inputs.shape[1] ** 0.5, mean[:, -1]

    def fit_head(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> VBLLClassifier:
        """Return the trained head on x. Arguments as for `fit`."""
        with torch.inference_mode(False), torch.enable_grad():
            x, y, w = _with_ones(inputs.clone().float()), labels.clone(), weights.clone().float()
            width, n = x.shape[1], len(x)
            rows = torch.zeros(int(y.max()) + 1, width)
            head = VBLLClassifier(width, len(rows), n, rows=rows, **self.options)
            optimiser = torch.optim.Adam(head.parameters(), RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
            for _ in range(STEPS):
                optimiser.zero_grad()
                ((head.kl() - head.noise_log_prior() - w @ head.bound(x, y)) / n).backward()
                optimiser.step()
                schedule.step()
        return head.requires_grad_(False)

    def fitted(self, backbone: nn.Module, support: Tensor, labels: Tensor) -> nn.Module:
        inputs, labels, weights, mean, spread = self.inputs(support, labels)
        head = self.fit_head(inputs, labels, weights).to(support.device)
        kind = torch.promote_types(support.dtype, torch.float32)
        return BayesianClassifier(backbone, head, mean.to(support.device, kind), float(spread))

    def describe(self) -> str:
        return f"vbll {SAMPLES} {STEPS} {RATE} {sorted(self.options.items())}"


class BayesianClassifier(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> log-probabilities (b, N) of a head on centred, scaled, L2-normalised features."""

    def __init__(self, backbone: nn.Module, head: VBLLClassifier, mean: Tensor, spread: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("mean", mean, persistent=False)
        self.spread = spread

    def forward(self, images: Tensor) -> Tensor:
        raw = features(self.backbone, images)
        with torch.autocast(raw.device.type, enabled=False):
            z = F.normalize(raw.to(self.mean.dtype), dim=1, eps=1e-12)
            x = _with_ones((z - self.mean) / self.spread)
            generator = torch.Generator().manual_seed(0)
            return self.head.predict(x, SAMPLES, generator, method="shared").clamp_min(SMALLEST).log()


def _with_ones(inputs: Tensor) -> Tensor:
    """Return x (n, d + 1) of inputs u (n, d)."""
    return torch.cat([inputs * inputs.shape[1] ** 0.5, inputs.new_ones(len(inputs), 1)], 1)
