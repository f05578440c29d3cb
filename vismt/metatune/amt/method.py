"""AMT's expert: LoRA factors that start at the principal part of the weight, one pair for each of q, k and v.

    DeltaW = s B A,    A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)    of W = U S V^T        (Yang, Liu, Wei, NeurIPS 2024)

What trains it: objective.py. Pool and merging at test time: pool.py, merging.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vismt.base.errors import UserError, near
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import inject
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.svd import kaiming, principal
from vismt.methods import Method, register_method


def amt(model: nn.Module, *, init: str = "svd", split_qkv: bool = True, **options: Any) -> AdaptReport:
    """Adapt a model as one AMT expert: factors for each q, k, v block and linear layer.

    init: "svd" (principal factors), or "lora" (zero B). The other arguments are those of `inject`.
    """
    if init not in ("svd", "lora"):
        raise UserError(f"adapt.init: '{init}' for 'amt'.{near(str(init), ('svd', 'lora'))}")
    if options.get("dropout"):
        raise UserError(f"adapt.dropout: {options['dropout']} with 'amt', whose factors carry most of W; set it to 0.")
    start = principal if init == "svd" else kaiming
    return inject(model, "amt", start, offset=init == "svd", split_qkv=split_qkv, **options)


register_method(Method("amt", amt, layers=(LowRankLayer,)))
