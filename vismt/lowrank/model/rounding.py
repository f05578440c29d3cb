"""What rounding to half precision takes from an update when it is merged: W + DeltaW has the spacing of W's numbers.

    erased = |round(W + DeltaW) - (W + DeltaW)|_F / |DeltaW|_F        over all adapted weights together

A bf16 number has 8 significant bits, so an update of 1 % of its weight keeps one or two of them.
"""

from __future__ import annotations

import torch
from torch import nn

from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.wrappers import check_mergeable, stock_order


@torch.no_grad()
def erased_by_rounding(model: nn.Module) -> float | None:
    """Return the share of the update (as Frobenius norms) that `merge` would lose in bf16 or fp16 weights.

    Args:
        model: an adapted model that merges; not changed.

    Returns:
        A number of at least 0; None without adapted weights in half precision, and for layers without factors.

    Raises:
        UserError: where the model cannot be merged now.
    """
    check_mergeable(model, "merge")
    lost = whole = 0.0
    with stock_order(model):
        for layer in adapter_layers(model).values():
            if layer.weight.dtype.itemsize > 2 or not layer.has_factors:
                continue
            update = layer.low_rank().delta()
            total = layer.matrix(layer.weight).float() + update
            lost += float((total.to(layer.weight.dtype).float() - total).square().sum(dtype=torch.float64))
            whole += float(update.square().sum(dtype=torch.float64))
    return (lost / whole) ** 0.5 if whole else None
