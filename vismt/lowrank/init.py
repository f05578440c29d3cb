"""Initialisers: pure functions (weight, rank, ...) -> (A, B), with weight (o, i), A (r, i), B (o, r), DeltaW = scale * B @ A.

kaiming   A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0                LoRA (Hu et al., arXiv 2106.09685), the layout PEFT ships
principal A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s)          PiSSA (Meng et al., arXiv 2404.02948): s*B@A is the top-r part of W

A principal start needs an offset, as CorDA's does (vismt.llm.corda.start): the layer keeps W whole and subtracts s * B0 @ A0,
the factors as they are stored, so that the function at the start is W itself and the original weight is never touched. The
released code stores W - s*B@A instead, which is the same function with one more rounding of W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismt.lowrank.svd import top_exact, top_randomized


def kaiming(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return uniform A with the variance of kaiming_uniform(a=sqrt(5)), zero B; both fp32 on CPU (fp64 for an fp64 weight)."""
    out_features, in_features = weight.shape
    dtype = working_dtype(weight)
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(out_features, rank, dtype=dtype)


def principal(
    weight: Tensor, rank: int, scale: float, *, method: str = "exact", generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return balanced top-`rank` factors of `weight`: scale * B @ A is its best rank-r approximation for any scale.

    method: "exact" or "randomized", see `vismt.lowrank.svd`. Both factors have the weight's `working_dtype`.
    Signs of the singular vectors are arbitrary; compare products, never A or B alone.
    """
    matrix = weight.detach().to(working_dtype(weight))
    U, S, Vh = top_exact(matrix, rank) if method == "exact" else top_randomized(matrix, rank, generator)
    root = (S / scale).sqrt()
    return (root[:, None] * Vh).to(weight.device, matrix.dtype), (U * root).to(weight.device, matrix.dtype)


def residual(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W - scale * B @ A (o, i) in the weight's `working_dtype`; give the stored factors, then round the result."""
    dtype = working_dtype(weight)
    return torch.addmm(weight.detach().to(dtype), B.detach().to(dtype), A.detach().to(dtype), alpha=-scale)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype to compute in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
