"""PiSSA: s B A starts as the best rank-r approximation of W, and W x + s (B A - B0 A0) x is trained (arXiv 2404.02948).

The paper freezes W_res = W - s B0 A0 and trains s B A; that is the same function of A and B. Here W stays whole and the
start is subtracted as two thin products (2r columns instead of r): the user's weights are never changed, unadapting is
exact, and W_res is not rounded in bf16. An adapter file carries A0 and B0, so nothing is recomputed on loading.
Dropout is refused: it would act on the principal part of W, not on a perturbation of zero.

QPiSSA (quantize="nf4") does change the base, and that is its point: the adapted weights become Q = nf4(W - s B A), the
function at the start is Q + s B A, nearer to W than nf4(W) is. Alternate L = top_r(W - Q), Q = nf4(W - L) from Q = 0; the
released code keeps the last of its iterates, we keep the one with the smallest |W - Q - L|_F. Q is computed from the
factors as they are stored, in the values that 4 bits can hold but in the weight's dtype: unadapt gives the model with Q
back, to be saved and loaded in 4 bits by whoever trains so (without double quantisation, which would round it again).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.llm.nf4 import nf4
from vismt.lowrank.init import principal, residual, working_dtype
from vismt.lowrank.inject import adapted_modules, inject
from vismt.lowrank.sites import AdaptReport
from vismt.lowrank.targets import Targets
from vismt.registry import register_method

SOLVERS = ("exact", "randomized")
GRIDS = ("nf4",)


@register_method("pissa")
def pissa(
    model: nn.Module, *, targets: Targets, rank: int, alpha: float | None, seed: int, method: str = "exact",
    quantize: str | None = None, iterations: int = 5, **options: Any,
) -> AdaptReport:
    """Principal factors of each weight (each q, k, v block with split_qkv). method: exact or randomized; and `inject`'s.

    quantize: "nf4" for QPiSSA, with `iterations` rounds; it replaces the adapted weights. None leaves them alone.
    """
    refuse_dropout("pissa", options)
    if method not in SOLVERS:
        raise UserError(f"adapt.method: no solver '{method}' for 'pissa'.{near(str(method), SOLVERS)}")
    if quantize is not None and quantize not in GRIDS:
        raise UserError(f"adapt.quantize: no grid '{quantize}' for 'pissa'.{near(str(quantize), GRIDS)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise UserError(f"adapt.iterations: {iterations!r}; it must be a whole number, at least 1.")

    def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if quantize:
            return quantized_principal(weight, rank, scale, iterations, method=method, generator=generator)
        return principal(weight, rank, scale, method=method, generator=generator)

    report = inject(
        model, "pissa", start, offset=quantize is None, targets=targets, rank=rank, alpha=alpha, seed=seed, **options
    )
    if quantize:
        _quantize_base(model)
    return report


def quantized_principal(
    weight: Tensor, rank: int, scale: float, iterations: int, *, method: str = "exact", generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors whose residual loses least in NF4: the best of `iterations` rounds by |W - nf4(W - s B A) - s B A|_F."""
    matrix = weight.detach().to(working_dtype(weight))
    quantized, best, least = torch.zeros_like(matrix), None, float("inf")
    for _ in range(iterations):
        A, B = principal(matrix - quantized, rank, scale, method=method, generator=generator)
        rest = residual(matrix, A, B, scale)
        quantized = nf4(rest)
        error = float((rest - quantized).norm())
        if best is None or error < least:
            best, least = (A, B), error
    return best


@torch.no_grad()
def _quantize_base(model: nn.Module) -> None:
    """Put Q = nf4(W - s B A) in the place of every adapted weight, for the factors as they are stored."""
    for host in adapted_modules(model).values():
        if not host.weight.is_meta:
            matrix = host.matrix(host.weight).to(working_dtype(host.weight))
            rest = matrix - host.low_rank().delta().to(matrix.dtype)
            host.weight.copy_(host.stored(nf4(rest)))


def refuse_dropout(method: str, options: Mapping[str, Any]) -> None:
    """A UserError where a method whose factors carry a part of W is asked to drop some of it."""
    if options.get("dropout"):
        raise UserError(f"adapt.dropout: {options['dropout']} with '{method}', whose factors carry a part of W; set it to 0.")
