"""Matrices with orthonormal columns: PoLAR's landing field, retractions, and the exact change of gauge.

Source: PoLAR, "Polar-Decomposed Low-Rank Adapter Representation" (arXiv 2506.03133) and, for the field, Ablin & Peyre,
"Fast and accurate optimization on the orthogonal manifold without retraction" (arXiv 2102.07432). For a tall Z (n, r)
with Euclidean gradient G, the field that replaces G before an optimiser step is

    Gamma(Z) = (G Z^T - Z G^T) Z + attraction * Z (Z^T Z - I)

The released code builds the n x n skew matrix; with K = Z^T Z the same value in O(n r^2) is

    Gamma(Z) = G K - Z (G^T Z) + attraction * Z (K - I)

We follow the code, not the paper, in the constants: no 1/2 in the skew part and no 4 in the attraction, so published
attraction strengths can be used as they are (the paper's lambda is 1/8 of it for N = ||Z^T Z - I||^2).

Left out: Cayley retraction and Riemannian momentum; the optimiser wrapper that applies the field is the method's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.errors import UserError


def landing_field(z: Tensor, grad: Tensor, attraction: float) -> Tensor:
    """The landing field at `z`: a descent direction along the manifold plus a pull towards it.

    Args:
        z: (n, r) with n >= r, near or off the manifold; a wide factor must be transposed first.
        grad: (n, r), the Euclidean gradient of the loss at `z`.
        attraction: strength of the pull, >= 0; in the convention of the authors' code.

    Returns (n, r) in the dtype of `grad`; half precision is computed in fp32. The two terms are orthogonal.
    """
    _require_tall(z)
    if grad.shape != z.shape:
        raise UserError(f"landing field: gradient is {tuple(grad.shape)}, factor {tuple(z.shape)}, need equal shapes.")
    if attraction < 0:
        raise UserError(f"landing field: attraction is {attraction}, needs >= 0 (negative pushes off the manifold).")
    work = torch.promote_types(z.dtype, torch.float32)
    point, gradient = z.to(work), grad.to(work)
    gram = point.mT @ point
    tangent = gradient @ gram - point @ (gradient.mT @ point)
    excess = gram - torch.eye(gram.shape[0], dtype=work, device=z.device)
    return (tangent + attraction * (point @ excess)).to(grad.dtype)


def tangent_projection(z: Tensor, grad: Tensor) -> Tensor:
    """`G Z^T Z - Z G^T Z` (n, r): the landing field without its pull, a tangent vector when `z` is on the manifold."""
    return landing_field(z, grad, 0.0)


def qr_retraction(z: Tensor, step: Tensor) -> Tensor:
    """The orthonormal factor (n, r) of `z + step` by a QR with positive diagonal: a zero step is no move."""
    _require_tall(z)
    q, upper = torch.linalg.qr((z + step).to(torch.promote_types(z.dtype, torch.float32)))
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).to(z.dtype)


def polar_retraction(z: Tensor, step: Tensor) -> Tensor:
    """The orthonormal (n, r) matrix nearest to `z + step` in the Frobenius norm (its polar factor)."""
    _require_tall(z)
    u, _, vh = torch.linalg.svd((z + step).to(torch.promote_types(z.dtype, torch.float32)), full_matrices=False)
    return (u @ vh).to(z.dtype)


def orthonormalize(x: Tensor, theta: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product `x @ theta @ y.T` with orthonormal outer factors: the R of both QRs moves into `theta`.

    Args:
        x: (o, r), o >= r. theta: (r, r), or (r,) for a diagonal. y: (i, r), i >= r.

    Returns `(x, theta, y)` of shapes (o, r), (r, r), (i, r), theta always a full matrix; computed in fp32 or better and
    returned in the dtype of `x`. A rank-deficient factor gets an orthonormal completion, the product is unchanged.
    """
    _require_tall(x)
    _require_tall(y)
    rank = x.shape[1]
    if y.shape[1] != rank or tuple(theta.shape) not in ((rank,), (rank, rank)):
        raise UserError(
            f"orthonormalize: x is {tuple(x.shape)}, theta {tuple(theta.shape)}, y {tuple(y.shape)}: "
            "needed (o, r), (r, r) or (r,), (i, r)."
        )
    work = torch.promote_types(x.dtype, torch.float32)
    q_x, r_x = torch.linalg.qr(x.to(work))
    q_y, r_y = torch.linalg.qr(y.to(work))
    middle = torch.diag(theta) if theta.ndim == 1 else theta
    return q_x.to(x.dtype), (r_x @ middle.to(work) @ r_y.mT).to(x.dtype), q_y.to(x.dtype)


def infeasibility(z: Tensor) -> Tensor:
    """`||Z^T Z - I||_F^2`, a scalar >= 0 that is zero exactly on the manifold (the square, as the authors log it)."""
    _require_tall(z)
    point = z.to(torch.promote_types(z.dtype, torch.float32))
    return (point.mT @ point - torch.eye(z.shape[1], dtype=point.dtype, device=z.device)).square().sum()


def _require_tall(z: Tensor) -> None:
    if z.ndim != 2 or z.shape[0] < z.shape[1]:
        raise UserError(f"stiefel: factor is {tuple(z.shape)}, needs (n, r) with n >= r; transpose a wide factor.")
