"""Weights of vectors as minimisers of functions of their Gram matrix M = <g_s, g_t>, in float64 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.linalg import eigh

RIDGE = 1e-12  # added to cosines: keeps weights finite where vectors cancel


def min_norm_weights(gram: Tensor) -> Tensor:
    """Return w (t,) >= 0 with sum 1 that minimises w^T M w, for a Gram matrix M (t, t) in float64.

    Exact (active set); one of the minimisers if there are several. w is u / sum(u) with u >= 0 the minimiser of
    u^T M u + (sum u - 1)^2, a least-squares problem for a root of M. It is solved for the cosines of M, because the tolerance
    of the solver does not account for gradients of very different lengths.
    """
    from scipy.optimize import nnls

    norms = gram.diagonal().clamp_min(0).sqrt()
    if norms.min() <= 1e-150 + 1e-15 * norms.max():  # a zero gradient is the shortest vector
        return torch.nn.functional.one_hot(norms.argmin(), len(gram)).to(gram)
    root = gram_root(gram / torch.outer(norms, norms))
    system = torch.cat([root, norms.min() / norms[None]]).numpy()
    target = np.zeros(len(system))
    target[-1] = 1
    u = torch.from_numpy(nnls(system, target, maxiter=100 * len(gram))[0]) / norms
    return u / u.sum()


def gram_root(gram: Tensor) -> Tensor:
    """Return R (t, t) with R^T R = M."""
    values, vectors = eigh(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def fair_weights(gram: Tensor, alpha: float) -> Tensor:
    """Return w (t,) > 0 with M w = w^(-1/alpha), for a Gram matrix M (t, t) in float64.

    For the cosines C of M and lengths n, u = n w minimises u^T C u / 2 - sum_t n_t^(1/alpha - 1) p(u_t), where p' = u^(-1/alpha):
    convex, so Newton steps that are halved until the function decreases find the minimum.
    """
    norms = gram.diagonal().sqrt()
    # Lengths relative to their geometric mean m; M = m^2 M' has w = m^(-2 alpha / (1 + alpha)) w'.
    mean = norms.log().mean().exp()
    lengths, power = norms / mean, 1 / alpha
    cosines = gram / torch.outer(norms, norms) + RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    factors = lengths ** (power - 1)

    def value(u: Tensor) -> float:
        gain = u.log() if power == 1 else u ** (1 - power) / (1 - power)
        return float(u @ cosines @ u / 2 - factors @ gain)

    u = factors ** (1 / (1 + power))  # the solution for orthogonal gradients
    for _ in range(200):
        slope = cosines @ u - factors * u**-power
        step = torch.linalg.solve(cosines + torch.diag(power * factors * u ** (-power - 1)), slope)
        change = float((step / u).abs().max())
        if change < 1e-13:
            break
        decrement = float(slope @ step)
        size = min(1.0, 0.9 / change)  # u stays positive
        now = value(u)
        # Near the minimum the function is flat to rounding, and whole steps converge.
        while change > 1e-4 and size > 1e-12 and value(u - size * step) > now - 1e-4 * size * decrement:
            size /= 2
        u = u - size * step
    return u / lengths * mean ** (-2 / (1 + power))
