"""PiSSA: s B A starts as the best rank-r approximation of W, and W x + s (B A - B0 A0) x is trained (arXiv 2404.02948).

The paper freezes W_res = W - s B0 A0 and trains s B A, which is the same function of A and B. Here W stays whole and the start
is subtracted as two thin products (2r columns instead of r). The user's weights are therefore never changed, unadapting is
exact, and W_res is not rounded in bf16. An adapter file carries A0 and B0, so nothing is recomputed on loading. Dropout is
refused, because it would act on the principal part of W and not on a perturbation of zero.

QPiSSA (quantize="nf4") trains on Q = nf4(W - s B0 A0) instead. The function at the start is Q + s B0 A0, which is nearer to W
than nf4(W) is. The rounds alternate L = top_r(W - Q) and Q = nf4(W - L), from Q = 0. The released code keeps the last round.
Here the round with the smallest |W - Q - L|_F is kept. Q has values that 4 bits can hold, in W's dtype, and is kept beside W
(vismt.llm.pissa.quantized). A file loads on W. Merging gives Q + s B A. An export as a plain LoRA is refused, because it would
be applied to W.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known
from vismt.llm.pissa.quantized import QuantizedLayer, on_grid, quantized_layer
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import InjectOptions, inject
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.model.targets import Targets
from vismt.lowrank.svd import principal, residual, working_dtype
from vismt.methods import Method, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVERS = ("exact", "randomized")


def pissa(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    solver: str = "exact",
    quantize: str | None = None,
    iterations: int = 5,
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add principal factors of each weight (of each q, k and v block with split_qkv).

    solver: "exact" or "randomized". iterations: Number of rounds of QPiSSA. quantize: "nf4" for QPiSSA, which puts 4-bit
    weights below the factors until the model is unadapted. "bitsandbytes" uses its kernels of the same levels, if it is
    installed. None keeps the original weights. Further options are the options of `inject`.
    """
    refuse_dropout("pissa", options)
    require_known("adapt.solver: 'pissa' has no solver", [solver], SOLVERS)
    need_whole("adapt.iterations:", iterations)
    layer = quantized_layer(model, quantize)
    start = partial(principal, method=solver)
    if quantize is not None:
        start = partial(quantized_principal, iterations=iterations, grid=quantize, solver=solver)
    return inject(model, "pissa", start, offset=quantize is None, targets=targets, seed=seed, **layer, **options)


def quantized_principal(
    weight: Tensor,
    rank: int,
    scale: float,
    generator: torch.Generator,
    iterations: int,
    grid: str = "nf4",
    solver: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Return the factors of the best of `iterations` rounds, by the rounding error |W - grid(W - s B A) - s B A|_F."""
    matrix = weight.detach().to(working_dtype(weight))
    quantized, least = torch.zeros_like(matrix), float("inf")
    best: Any = None
    for _ in range(iterations):
        A, B = principal(matrix - quantized, rank, scale, generator, solver)
        rest = residual(matrix, A, B, scale)
        quantized = on_grid(rest, grid)
        error = float((rest - quantized).norm())
        if best is None or error < least:
            best, least = (A, B), error
    return best


def refuse_dropout(method: str, options: Mapping[str, object]) -> None:
    """Raise UserError for dropout with a method that has a part of W in its factors."""
    if options.get("dropout"):
        raise UserError(
            f"adapt.dropout: {options['dropout']} with '{method}', which has a part of W in its factors; set it to 0."
        )


register_method(Method("pissa", pissa, layers=(LowRankLayer, QuantizedLayer)))
