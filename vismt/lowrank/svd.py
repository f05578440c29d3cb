"""Start values of factors, and the leading singular vectors that they need, exactly or by a seeded range finder.

A start is a pure function (weight, rank, scale, generator) -> (A, B) with weight (o, i), A (r, i), B (o, r) and DeltaW = scale
* B @ A.

    kaiming   A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0         LoRA (Hu et al., arXiv 2106.09685), the layout that peft has
    principal A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s)   PiSSA (Meng et al., arXiv 2404.02948): s*B@A is the top-r part of W

A principal start needs an offset, and so does CorDA's. The layer keeps W whole and subtracts s * B0 @ A0, the factors as they
are stored. The function at the start is then W itself, and the original weight is never touched. The released code stores W -
s*B@A instead, which is the same function with one more rounding of W.

The exact way computes eigenvectors of the smaller Gram matrix in fp64, two to three times faster than an fp32 SVD. Squaring the
matrix halves the digits, so singular values are resolved down to 1e-8 of the largest (an fp32 SVD resolves 1e-7).

The randomised way (Halko, Martinsson, Tropp, 2011) begins with a seeded Gaussian matrix with `OVERSAMPLE` extra columns. Plain
power steps multiply an eigenvalue by itself. Here Rayleigh-Ritz values locate the unwanted end [0, cut] of the Gram spectrum,
and a Chebyshev polynomial damps it (Saad, Numerical Methods for Large Eigenvalue Problems, 2011, ch. 7). At the cost of a few
power steps this finds the leading subspace of flat spectra too. Columns that grow apart by more than `GROWTH` would lose each
other in rounding, which bounds the degree. The next round then starts from orthonormal columns again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLE, _STEPS, DEGREE, GROWTH = 8, 12, 4, 1e6
# The Gram matrix costs n columns of products. The steps cost (_STEPS + 2) * 2 thinner and slower products for each column.
GRAM_PAYS = 48


def top_exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top singular triplets U (o, r), S (r,) descending, Vh (r, i), in fp64, of a matrix (o, i)."""
    matrix = double(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        U, S, Vh = top_exact(matrix.T, rank)
        return Vh.T, S, U.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    U = vectors[:, -rank:].flip(1)
    # A vanishing singular value leaves its right vector undefined. Its row of Vh is zero, like the singular value.
    alive = S[0] * 1e-7 < S
    S = torch.where(alive, S, 0)
    return U, S, reciprocal(S)[:, None] * (U.T @ matrix)


def top_randomized(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return nearly the top singular triplets, like `top_exact` but in the matrix's own dtype (fp32 or fp64).

    generator: Generator on the CPU. Two calls with the same state give the same bits, and no other random state is touched.
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, Vh = top_randomized(matrix.T, rank, generator)
        return Vh.T, S, U.T
    size, columns = matrix.shape[0], min(rank + OVERSAMPLE, matrix.shape[0])
    gram = matrix @ matrix.T if size <= GRAM_PAYS * columns else None

    def times_gram(Y: Tensor) -> Tensor:
        return matrix @ (matrix.T @ Y) if gram is None else gram @ Y

    start = torch.randn(size, columns, dtype=matrix.dtype, generator=generator).to(matrix.device)
    Q, left = torch.linalg.qr(times_gram(start)).Q, _STEPS
    while left > 0:
        Y = times_gram(Q)
        values = torch.linalg.eigvalsh(Q.T @ Y).tolist()
        degree = min(left, _degree(values[-1], values[(columns - rank) // 2]))
        Q = torch.linalg.qr(_chebyshev(times_gram, Q, Y, values[(columns - rank) // 2], degree)).Q
        left -= degree
    thin = Q.T @ matrix
    values, vectors = torch.linalg.eigh(double(thin @ thin.T))
    rotation = vectors[:, -rank:].flip(1).to(matrix.dtype)
    rows = rotation.T @ thin
    S = rows.norm(dim=1)
    return Q @ rotation, S, reciprocal(S)[:, None] * rows


def double(matrix: Tensor) -> Tensor:
    """Return the matrix in fp64. If its device has no fp64, the result is on the CPU."""
    return matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, torch.float64)


def _degree(top: float, cut: float) -> int:
    """Return the largest degree up to DEGREE whose Chebyshev polynomial at `top` stays below GROWTH.

    The polynomial is at most 1 on [0, cut].
    """
    if cut <= 0 or top <= cut:
        return 1
    # T_d(x) = cosh(d acosh(x)), about exp(d acosh(x)) / 2, with [0, cut] mapped to [-1, 1]
    return max(1, min(DEGREE, int(math.log(2 * GROWTH) / math.acosh(2 * top / cut - 1))))


def _chebyshev(times_gram: Callable[[Tensor], Tensor], Q: Tensor, product: Tensor, cut: float, degree: int) -> Tensor:
    """Return T_degree(2 G / cut - 1) Q for the Gram matrix G, given product = G Q. Degree 1 gives G Q itself."""
    if degree == 1:
        return product
    before, now = Q, torch.sub(product * (2 / cut), Q)
    for _ in range(degree - 1):
        before, now = now, (times_gram(now) * (4 / cut)).sub_(now, alpha=2).sub_(before)
    return now


def reciprocal(values: Tensor) -> Tensor:
    """Return 1 / x, and 0 where x is 0."""
    return torch.where(values > 0, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0)


def kaiming(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return uniform A with the variance of kaiming_uniform(a=sqrt(5)), and zero B, for any scale.

    Both are fp32 on the CPU, or fp64 for an fp64 weight.
    """
    out_features, in_features = weight.shape
    dtype = working_dtype(weight)
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(out_features, rank, dtype=dtype)


def principal(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator, method: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Return balanced top-`rank` factors of `weight`. scale * B @ A is its best rank-r approximation for any scale.

    method: "exact" or "randomized", see `vismt.lowrank.svd`. Both factors have the weight's `working_dtype`. The signs of
    singular vectors are arbitrary, so compare products and never A or B alone.
    """
    matrix = weight.detach().to(working_dtype(weight))
    U, S, Vh = top_exact(matrix, rank) if method == "exact" else top_randomized(matrix, rank, generator)
    root = (S / scale).sqrt()
    return (root[:, None] * Vh).to(weight.device, matrix.dtype), (U * root).to(weight.device, matrix.dtype)


def residual(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W - scale * B @ A (o, i) in the weight's `working_dtype`.

    Pass the factors as they are stored, and round the result afterwards.
    """
    dtype = working_dtype(weight)
    return torch.addmm(weight.detach().to(dtype), B.detach().to(dtype), A.detach().to(dtype), alpha=-scale)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype to compute and train in: fp64 for fp64, and fp32 for everything else.

    Half precision and packed bytes give fp32 too.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
