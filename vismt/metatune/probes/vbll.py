"""VBLL probe: a Bayesian last layer on support features (vismt/uncertainty/vbll.py), whose answers average over its posterior.

With u, w of linear.py and x = (sqrt(d) u, 1), so that a coordinate of x has mean square 1,

    q = argmin  -1/n sum_i w_i bound(x_i, y_i) + (KL(q, prior) - log prior of the noise) / n
    logits: bayesian.py with m(x), R(x) = sqrt(v(x))

by STEPS steps of Adam over the whole support, from means of 0, the mode of the prior. So the answer depends on the support alone.
The posterior matters most where the support is small: with one image a class the data fix one direction for each class, and all
others keep the prior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismt.metatune.probes.bayesian import BayesianProbe, with_ones
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.uncertainty.vbll import VBLLClassifier

STEPS = 200
RATE = 0.05


class VBLLProbe(BayesianProbe):
    """Prototypes replaced by a Bayesian last layer (equations in this file's header); options: further ones of the head."""

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
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
            for _ in range(STEPS):
                optimiser.zero_grad()
                ((head.kl() - head.noise_log_prior() - w @ head.bound(x, y)) / n).backward()
                optimiser.step()
                schedule.step()
        return head.requires_grad_(False)

    @staticmethod
    def expand(u: Tensor) -> Tensor:
        return with_ones(u * u.shape[1] ** 0.5)

    def describe(self) -> str:
        return f"vbll probit {STEPS} {RATE} {sorted(self.options.items())}"
