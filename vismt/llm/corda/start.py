"""The start of CorDA: factors of the part of a weight that the first or last components of W C' span (arXiv 2406.05223).

    W C' = U S V^T      s B A = U_J U_J^T W,  J the first or last r      C' = C + d mean(diag C) I

Yang et al. write s B A = U_J S_J (V^T C'^-1)_J. Since U_J^T W C' = S_J V_J^T that is U_J U_J^T W, and no inverse is needed. The
released code inverts C' in fp32 and doubles the damping until |C' C'^-1 - I| < 0.05, a test that depends on rounding and
never ends for a NaN. In both, d = 0.01 at first; here it is doubled while C' is not positive definite.

The last components are found exactly, by the eigenvectors of the smaller Gram matrix in fp64, on a CPU only the needed
ones (LAPACK's syevr by scipy, a quarter of the time of all of them at n = 1376, r = 16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.svd import double, reciprocal, top_exact, top_randomized, working_dtype

DAMPING, DOUBLINGS = 0.01, 20


def corda_factors(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    scale: float,
    *,
    smallest: bool,
    balanced: bool,
    solver: str = "exact",
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return factors of the part of `weight` (o, i) that the first or last `rank` components of W C' span.

    C' is the damped covariance. covariance: (i, i), finite, symmetric.
    smallest: the last components (knowledge-preserved) instead of the first.
    balanced: |A| = |B| by the SVD of the product, whatever the scale of the covariance. Raw: the published
    A = sqrt(S/s) V^T C'^-1 and B = U sqrt(S/s), where c C gives B sqrt(c) and A / sqrt(c).
    solver: "exact", or "randomized" for the first components. Raises UserError where no damping makes C' positive definite.
    """
    matrix = weight.detach().to(working_dtype(weight))
    exact = solver == "exact"
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
        A, B = even.A / math.sqrt(scale), even.B / math.sqrt(scale)
    else:
        root = (S / scale).sqrt()
        # S_J V_J^T C'^-1 = U_J^T W, so sqrt(S/s) V^T C'^-1 = U^T W / sqrt(S s); a vanishing component has no direction.
        A = torch.where(S > 0, 1 / (S * scale).clamp_min(1e-300 if exact else 1e-30).sqrt(), 0)[:, None] * rows
        B = U * root
    return A.to(weight.device, working_dtype(weight)), B.to(weight.device, working_dtype(weight))


def damped(covariance: Tensor) -> Tensor:
    """Return C + d mean(diag C) I, (i, i), with the first d of 0.01, 0.02, 0.04, ... that makes it positive definite.

    The identity where C is zero: an input that was always zero prefers no direction. Raises UserError after 20
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
    raise UserError("covariance: no damping makes it positive definite; it is not a sum of x x^T, collect it again.")


def last_left(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors U (o, r) of the `rank` smallest singular values, and these values (r,), in fp64.

    There are min(o, i) singular values; both results descend. Where o > i, a column with a vanishing singular value is zero,
    since nothing defines it.
    """
    matrix = double(matrix)
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    if matrix.device.type == "cpu":
        from scipy.linalg import LinAlgError, eigh
        from scipy.linalg.blas import dsyrk

        gram = dsyrk(1.0, short.numpy(), lower=1)  # one triangle, for half of a product's work
        try:
            ascending = eigh(gram, lower=True, subset_by_index=(0, rank - 1), driver="evr")[1]
        except LinAlgError as error:
            raise UserError(f"covariance: LAPACK finds no components of W C ({error}); collect it again.") from error
        vectors = torch.from_numpy(ascending).flip(1)
    else:
        vectors = torch.linalg.eigh(short @ short.T).eigenvectors[:, :rank].flip(1)
    if wide:
        return vectors, (vectors.T @ matrix).norm(dim=1)
    images = matrix @ vectors
    S = images.norm(dim=0)
    return images * reciprocal(torch.where(1e-14 * matrix.norm() < S, S, 0)), S
