"""Initialisers: pure functions (weight, rank, ...) -> (A, B), with weight (o, i), A (r, i), B (o, r), DeltaW = scale * B @ A.

kaiming   A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0                LoRA (Hu et al., arXiv 2106.09685), the layout PEFT ships
principal A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s)          PiSSA (Meng et al., arXiv 2404.02948): s*B@A is the top-r part of W

A principal initialiser needs an offset: the host keeps W whole and subtracts s * B0 @ A0, so that the function at the
start is W itself and the original weight is never touched. The released code stores W - s*B@A instead, which is the
same function with one more rounding of W.

Left out here: context-oriented and orthogonal starts, which come with the methods that use them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform A with the variance of kaiming_uniform(a=sqrt(5)), zero B; both fp32 on CPU (fp64 for an fp64 weight)."""
    out_features, in_features = weight.shape
    dtype = working_dtype(weight)
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(out_features, rank, dtype=dtype)


def principal(
    weight: Tensor, rank: int, scale: float, *, method: str = "exact", generator: torch.Generator,
    iterations: int = 4, oversample: int = 8,
) -> tuple[Tensor, Tensor]:
    """Balanced top-`rank` factors of `weight`: scale * B @ A is its best rank-r approximation for any scale.

    method: "exact" takes the eigenvectors of the smaller Gram matrix in fp64; "randomized" a seeded range finder with
    `oversample` extra columns and `iterations` power steps, re-orthonormalised each time (Halko et al., 2011, alg. 4.4).
    Signs of the singular vectors are arbitrary; compare products, never A or B alone.
    """
    matrix = weight.detach().to(torch.float64)
    if method == "randomized":
        matrix = weight.detach().to(working_dtype(weight))
        U, S, Vh = _range_finder(matrix, rank, iterations, oversample, generator)
    else:
        U, S, Vh = _top_by_gram(matrix, rank)
    root = (S / scale).sqrt()
    dtype = working_dtype(weight)
    return (root[:, None] * Vh).to(dtype), (U * root).to(dtype)


def working_dtype(weight: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _top_by_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets through eigh of the smaller Gram matrix; matrix must be fp64 (the condition is squared)."""
    if matrix.shape[0] > matrix.shape[1]:
        U, S, Vh = _top_by_gram(matrix.T, rank)
        return Vh.T, S, U.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    U = vectors[:, -rank:].flip(1)
    # A vanishing singular value leaves its right vector undefined: that row of A is zero, as is sqrt(S) on the left.
    alive = S[0] * 1e-7 < S
    inverse = torch.where(alive, 1 / S.clamp_min(torch.finfo(S.dtype).tiny), torch.zeros_like(S))
    return U, torch.where(alive, S, torch.zeros_like(S)), inverse[:, None] * (U.T @ matrix)


def _range_finder(
    matrix: Tensor, rank: int, iterations: int, oversample: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(rank + oversample, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, dtype=matrix.dtype, generator=generator).to(matrix.device)
    Q = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank]
