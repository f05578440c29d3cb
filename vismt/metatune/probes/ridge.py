"""Ridge probe: regression of the one-hot labels on a task's support features, in closed form, strength by leave-one-out.

With u, w of linear.py, the rows scaled by sqrt(w): U = diag(w)^1/2 u (n, d), T = diag(w)^1/2 (onehot(y) - 1/N) (n, N),

    min_W  |U W^T - T|^2 + lambda |W|^2,    W^T = U^T G T,    G = (U U^T + lambda I)^-1 (n, n),    logits = 10 (u W^T + 1/N)

the dual form, which needs n x n numbers where the primal one needs d x d. The intercept is not regularised. For weighted
centred rows it is the weighted mean, and the fit of image i is H_i T with I - H = lambda G - sqrt(w) sqrt(w)^T / n. So the
residual of image i under the fit to the other images (w as it is, a new intercept) is exactly

    e_i = [lambda G T]_i / ( sqrt(w_i) (lambda G_ii - w_i / n) )

lambda is the value of STRENGTHS with the least sum_i w_i |e_i|^2. U U^T has trace n, so lambda = 1 is its mean eigenvalue.
Without an image a class has no prediction, so images that are alone in their class are left out of the sum; where all are
(1 shot), lambda = 1. No query takes part.

Ridge regression as a few-shot classifier: Bertinetto et al. (R2-D2), arXiv 1805.08136, who meta-learn lambda and the scale
of the logits. Here the scale is fixed, at the 10 of the cosine classifier: regression outputs lie around 0 and 1, of which
a softmax would make nearly equal probabilities. Leave-one-out of linear smoothers: Allen's PRESS, Technometrics 16, 1974.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.metatune.probes.linear import LinearProbe

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT = 1.0
SCALE = 10.0


class RidgeProbe(LinearProbe):
    """Prototypes replaced by ridge regression (equations in this file's header)."""

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        targets = F.one_hot(labels).double()
        ways = targets.shape[1]
        U, T = weights.sqrt()[:, None] * inputs, weights.sqrt()[:, None] * (targets - 1 / ways)
        strength = choose_strength(U, T, labels, weights)
        W = torch.linalg.solve(U @ U.T + strength * torch.eye(len(U)).to(U), T).T @ U
        return SCALE * W, torch.full((ways,), SCALE / ways).to(W)

    def describe(self) -> str:
        return f"ridge {STRENGTHS} {DEFAULT} {SCALE}"


def left_out_residuals(U: Tensor, T: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Return e (n, N): the residual of each image under the fit to the others, of U (n, d), T (n, N) and w (n,)."""
    shrunk = strength * torch.linalg.inv(U @ U.T + strength * torch.eye(len(U)).to(U))
    return (shrunk @ T) / (weights.sqrt() * (shrunk.diagonal() - weights / len(U)))[:, None]


def choose_strength(U: Tensor, T: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Return the strength with the least leave-one-out error on the support, the first among equals."""
    judged = labels.bincount()[labels] > 1
    if not bool(judged.any()):
        return DEFAULT
    errors = [
        float((weights * left_out_residuals(U, T, weights, strength).square().sum(1))[judged].sum())
        for strength in STRENGTHS
    ]
    return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]
