"""Matrices with orthonormal columns: PoLAR's landing field, retractions, and the exact change of gauge.

Source: PoLAR, "Polar-Decomposed Low-Rank Adapter Representation" (arXiv 2506.03133) and, for the field, Ablin & Peyre, "Fast
and accurate optimization on the orthogonal manifold without retraction" (arXiv 2102.07432). For a tall Z (n, r) with Euclidean
gradient G, the field that replaces G before an optimiser step is

    Gamma(Z) = (G Z^T - Z G^T) Z + attraction * Z (Z^T Z - I)

The released code builds the n x n skew matrix. With K = Z^T Z the same value is computed in O(n r^2):

    Gamma(Z) = G K - Z (G^T Z) + attraction * Z (K - I)

The constants follow the code and not the paper. There is no 1/2 in the skew part and no 4 in the attraction, so published
attraction strengths can be used unchanged (the paper's lambda is 1/8 of them for N = ||Z^T Z - I||^2).

All functions take one matrix or a batch of matrices, (..., n, r). Left out: Riemannian momentum. landing.py has the optimiser
that applies the field.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.factors import times_core


def landing_field(z: Tensor, grad: Tensor, attraction: float) -> Tensor:
    """Return the landing field at `z`: a descent direction along the manifold plus a pull towards it.

    Args:
        z: Matrix (..., n, r) with n >= r, near or off the manifold. Transpose a wide factor first.
        grad: Euclidean gradient (..., n, r) of the loss at `z`.
        attraction: Strength of the pull, >= 0, in the convention of the authors' code.

    Returns:
        The field (..., n, r) in the dtype of `grad`. Half precision is computed in fp32. The two terms are orthogonal. Without
        attraction the field is a tangent vector if `z` is on the manifold.
    """
    _check_field(z, grad, attraction)
    point, gradient = _working(z), _working(grad)
    excess = _excess(point)
    # G K - Z (G^T Z - attraction (K - I)) with K = I + excess: three thin products, no n x n matrix.
    field = gradient + gradient @ excess - point @ (gradient.mT @ point - attraction * excess)
    return field.to(grad.dtype)


def penalty_field(z: Tensor, grad: Tensor, attraction: float) -> Tensor:
    """Return `G + attraction * Z (Z^T Z - I)` (..., n, r): the plain gradient with the same pull, to compare with."""
    _check_field(z, grad, attraction)
    return (_working(grad) + attraction * pull(_working(z))).to(grad.dtype)


def pull(z: Tensor) -> Tensor:
    """Return `Z (Z^T Z - I)` (..., n, r), the gradient of a quarter of the infeasibility, in fp32 or better."""
    _require_tall(z)
    point = _working(z)
    return point @ _excess(point)


def qr_retraction(z: Tensor, step: Tensor) -> Tensor:
    """Return the orthonormal factor (..., n, r) of `z + step` by a QR with positive diagonal. A zero step does not move."""
    _require_tall(z)
    q, upper = torch.linalg.qr(_working(z + step))
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).to(z.dtype)


def polar_retraction(z: Tensor, step: Tensor) -> Tensor:
    """Return the orthonormal (..., n, r) matrix nearest to `z + step` in the Frobenius norm (its polar factor)."""
    _require_tall(z)
    u, _, vh = torch.linalg.svd(_working(z + step), full_matrices=False)
    return (u @ vh).to(z.dtype)


def cayley_retraction(z: Tensor, step: Tensor) -> Tensor:
    """Return `(I - A/2)^-1 (I + A/2) Z` (..., n, r), with a skew A such that A Z is the tangent part of `step`.

    Z^T Z does not change. With P = step - Z Z^T step / 2 and A = P Z^T - Z P^T = U V^T, U = [P, Z] and V = [Z, -P], Woodbury
    turns the n x n inverse into a 2 r x 2 r inverse: Z + U (I - V^T U / 2)^-1 V^T Z. `z` must be orthonormal. For a step along
    the landing field, A is -eta (G Z^T - Z G^T) of the released code.
    """
    _require_tall(z)
    point, move = _working(z), _working(step)
    half = move - 0.5 * point @ (point.mT @ move)
    left, right = torch.cat([half, point], -1), torch.cat([point, -half], -1)
    small = torch.eye(left.shape[-1], dtype=point.dtype, device=z.device) - 0.5 * (right.mT @ left)
    return (point + left @ torch.linalg.solve(small, right.mT @ point)).to(z.dtype)


def orthonormalize(x: Tensor, theta: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same product `x @ theta @ y.T` with orthonormal outer factors. The R of both QRs moves into `theta`.

    Args:
        x: Factor (o, r), o >= r.
        theta: Core (r, r), or (r,) for a diagonal.
        y: Factor (i, r), i >= r.

    Returns:
        `(x, theta, y)` of the same shapes, computed in fp32 or better and returned in the dtype of `x`. A diagonal theta holds
        the singular values of the product. A rank-deficient factor gets an orthonormal completion.
    """
    _require_tall(x)
    _require_tall(y)
    rank = x.shape[1]
    if y.shape[1] != rank or tuple(theta.shape) not in ((rank,), (rank, rank)):
        raise UserError(
            f"orthonormalize: x is {tuple(x.shape)}, theta {tuple(theta.shape)}, y {tuple(y.shape)}: "
            "needed (o, r), (r, r) or (r,), (i, r)."
        )
    (q_x, r_x), (q_y, r_y) = torch.linalg.qr(_working(x)), torch.linalg.qr(_working(y))
    middle = times_core(r_x, theta.to(r_x.dtype)) @ r_y.mT
    if theta.ndim == 1:
        u, middle, vh = torch.linalg.svd(middle)
        q_x, q_y = q_x @ u, q_y @ vh.mT
    return q_x.to(x.dtype), middle.to(x.dtype), q_y.to(x.dtype)


def infeasibility(z: Tensor) -> Tensor:
    """Return `||Z^T Z - I||_F^2` (...), which is zero exactly on the manifold (the square, as the authors log it)."""
    _require_tall(z)
    return _excess(_working(z)).square().sum((-2, -1))


def stable_rank(x: Tensor, theta: Tensor, y: Tensor) -> Tensor:
    """Return `||M||_F^2 / ||M||_2^2` (...) of M = x theta y^T, in [1, r]. M = 0 gives 0.

    x: Factor (..., o, r). theta: Core (..., r, r). y: Factor (..., i, r). They may be off the manifold. The value is computed
    from r x r matrices, without a QR of x and y. The Gram matrices square the condition. With factors in fp32, directions below
    1e-3 of the largest are rounded, and a ratio of squares does not show this.
    """
    values = torch.linalg.svdvals(_root(x) @ _working(theta) @ _root(y).mT)
    largest = values[..., :1]
    return torch.where(largest > 0, values / largest, 0.0).square().sum(-1)


def _root(z: Tensor) -> Tensor:
    """Return an r x r matrix S with S^T S = Z^T Z."""
    point = _working(z)
    values, vectors = torch.linalg.eigh(point.mT @ point)
    return values.clamp_min(0).sqrt()[..., :, None] * vectors.mT


def _excess(z: Tensor) -> Tensor:
    return z.mT @ z - torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)


def _working(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check_field(z: Tensor, grad: Tensor, attraction: float) -> None:
    _require_tall(z)
    if grad.shape != z.shape:
        raise UserError(f"landing field: gradient is {tuple(grad.shape)}, factor {tuple(z.shape)}, need equal shapes.")
    if attraction < 0:
        raise UserError(f"landing field: attraction is {attraction}, needs >= 0 (negative pushes off the manifold).")


def _require_tall(z: Tensor) -> None:
    if z.ndim < 2 or z.shape[-2] < z.shape[-1]:
        raise UserError(f"stiefel: factor is {tuple(z.shape)}, needs (n, r) with n >= r; transpose a wide factor.")
