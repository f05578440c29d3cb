"""Initialisers: pure functions (weight, rank, ...) -> (A, B), with weight (o, i), A (r, i), B (o, r), DeltaW = scale * B @ A.

kaiming   A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0                LoRA (Hu et al., arXiv 2106.09685), the layout PEFT ships
principal A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s)          PiSSA (Meng et al., arXiv 2404.02948): s*B@A is the top-r part of W
context   s*B@A = U_J U_J^T W, with U S V^T = W C'            CorDA (Yang et al., arXiv 2406.05223), J the first or last r

A principal or context start needs an offset: the host keeps W whole and subtracts s * B0 @ A0, the factors as they are
stored, so that the function at the start is W itself and the original weight is never touched. The released code stores
W - s*B@A instead, which is the same function with one more rounding of W.

CorDA writes s*B@A = U_J S_J (V^T C'^-1)_J. Since U_J^T W C' = S_J V_J^T that is U_J U_J^T W, and no inverse is needed: the
released code inverts C' in fp32 and doubles the damping until |C' C'^-1 - I| < 0.05, a test that depends on rounding and
never ends for a NaN. C' = C + d mean(diag C) I here as there, with d = 0.01, doubled while C' is not positive definite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.solvers import double, last_left, top_exact, top_randomized

DAMPING, DOUBLINGS = 0.01, 20


def kaiming(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform A with the variance of kaiming_uniform(a=sqrt(5)), zero B; both fp32 on CPU (fp64 for an fp64 weight)."""
    out_features, in_features = weight.shape
    dtype = working_dtype(weight)
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(out_features, rank, dtype=dtype)


def principal(
    weight: Tensor, rank: int, scale: float, *, method: str = "exact", generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Balanced top-`rank` factors of `weight`: scale * B @ A is its best rank-r approximation for any scale.

    method: "exact" or "randomized", see `vismt.lowrank.solvers`. Both factors have the weight's `working_dtype`.
    Signs of the singular vectors are arbitrary; compare products, never A or B alone.
    """
    matrix = weight.detach().to(working_dtype(weight))
    U, S, Vh = top_exact(matrix, rank) if method == "exact" else top_randomized(matrix, rank, generator)
    root = (S / scale).sqrt()
    return (root[:, None] * Vh).to(weight.device, matrix.dtype), (U * root).to(weight.device, matrix.dtype)


def context(
    weight: Tensor, covariance: Tensor, rank: int, scale: float, *, smallest: bool, balanced: bool,
    method: str = "exact", generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Factors of the part of `weight` (o, i) that the first or last `rank` components of W C' span, C' the damped covariance.

    covariance: (i, i), finite, symmetric. smallest: the last components (knowledge-preserved) instead of the first.
    balanced: |A| = |B| by the SVD of the product, whatever the scale of the covariance. Raw: the published
    A = sqrt(S/s) V^T C'^-1 and B = U sqrt(S/s), where c C gives B sqrt(c) and A / sqrt(c).
    method: "exact", or "randomized" for the first components. Raises UserError where no damping makes C' positive definite.
    """
    matrix = weight.detach().to(working_dtype(weight))
    exact = method == "exact"
    spread = damped(covariance.to(dtype=working_dtype(covariance)))
    if exact:
        matrix, spread = double(matrix), double(spread)
    product = matrix @ spread.to(matrix.device, matrix.dtype)
    if smallest:
        U, S = last_left(product, rank)
    else:
        U, S, _ = top_exact(product, rank) if exact else top_randomized(product, rank, generator)
    rows = U.T @ matrix
    if balanced:
        even = LowRank(U, rows).balanced()
        A, B = even.R / math.sqrt(scale), even.L / math.sqrt(scale)
    else:
        root = (S / scale).sqrt()
        # S_J V_J^T C'^-1 = U_J^T W, so sqrt(S/s) V^T C'^-1 = U^T W / sqrt(S s); a vanishing component has no direction.
        A = torch.where(S > 0, 1 / (S * scale).clamp_min(1e-300 if exact else 1e-30).sqrt(), 0)[:, None] * rows
        B = U * root
    return A.to(weight.device, working_dtype(weight)), B.to(weight.device, working_dtype(weight))


def damped(covariance: Tensor) -> Tensor:
    """C + d mean(diag C) I, (i, i), with the first d of 0.01, 0.02, 0.04, ... that makes it positive definite.

    The identity where C is zero: an input that never was anything prefers no direction. Raises UserError after 20
    doublings, and at once where C has values that are not finite.
    """
    if not bool(covariance.isfinite().all()):
        raise UserError("covariance: it has values that are infinite or NaN; collect it again.")
    mean = float(covariance.diagonal().mean())
    if mean == 0 and not bool(covariance.any()):
        return torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doubling in range(DOUBLINGS + 1):
        spread = covariance.clone()
        spread.diagonal().add_(DAMPING * 2**doubling * mean)
        if int(torch.linalg.cholesky_ex(spread).info) == 0:
            return spread
    raise UserError("covariance: no damping makes it positive definite; it is no sum of x x^T, collect it again.")


def residual(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W - scale * B @ A (o, i) in the weight's `working_dtype`; give the factors as they are stored, then round the result."""
    kind = working_dtype(weight)
    return torch.addmm(weight.detach().to(kind), B.detach().to(kind), A.detach().to(kind), alpha=-scale)


def working_dtype(weight: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
