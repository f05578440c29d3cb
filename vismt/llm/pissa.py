"""PiSSA: s B A starts as the best rank-r approximation of W, and W x + s (B A - B0 A0) x is trained (arXiv 2404.02948).

The paper freezes W_res = W - s B0 A0 and trains s B A; that is the same function of A and B. Here W stays whole and the
start is subtracted as two thin products (2r columns instead of r): the user's weights are never changed, unadapting is
exact, and W_res is not rounded in bf16. An adapter file carries A0 and B0, so nothing is recomputed on loading.
Dropout is refused: it would act on the principal part of W, not on a perturbation of zero.
Left out: the quantised variant (QPiSSA).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.lowrank.init import principal
from vismt.lowrank.inject import inject
from vismt.lowrank.sites import AdaptReport
from vismt.lowrank.targets import Targets
from vismt.registry import register_method

SOLVERS = ("exact", "randomized")


@register_method("pissa")
def pissa(
    model: nn.Module, *, targets: Targets, rank: int, alpha: float | None, seed: int, method: str = "exact", **options: Any
) -> AdaptReport:
    """Principal factors of each weight (each q, k, v block with split_qkv). method: exact or randomized; and `inject`'s."""
    if options.get("dropout"):
        raise UserError(f"adapt.dropout: {options['dropout']} with 'pissa', whose factors carry most of W; set it to 0.")
    if method not in SOLVERS:
        raise UserError(f"adapt.method: no solver '{method}' for 'pissa'.{near(str(method), SOLVERS)}")

    def start(weight: Tensor, rank: int, scale: float, generator: Any) -> tuple[Tensor, Tensor]:
        return principal(weight, rank, scale, method=method, generator=generator)

    return inject(model, "pissa", start, offset=True, targets=targets, rank=rank, alpha=alpha, seed=seed, **options)
