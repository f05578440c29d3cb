"""What a training changed, matrix by matrix: one line each in changes.jsonl of the training's folder.

    change = |DeltaW|_F      weight = |W|_F      stable rank = |DeltaW|_F^2 / |DeltaW|_2^2

DeltaW of a layer with factors comes from its factors, so that no rounding of a half-precision weight is counted; of weights that
are trained in place, and of tuners without factors, it is the merged weight minus the stock one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.model.merge import undo
from vismt.lowrank.model.modules import stock_order


def weight_changes(adapted: nn.Module, merged: nn.Module) -> list[dict[str, Any]]:
    """Return a line for every matrix in which a trained model, `merged`, differs from the stock one, `adapted` afterwards."""
    lines = []
    with torch.no_grad(), stock_order(adapted):
        for path, layer in adapter_layers(adapted).items():
            if layer.has_factors:
                values = cast(Tensor, layer.low_rank().svd().core)  # singular values
                lines.append(_line(f"{path}.weight", layer.matrix(layer.weight), values))
    undo(adapted)
    measured = {line["weight"] for line in lines}
    after = dict(merged.named_parameters())
    for name, parameter in adapted.named_parameters():
        stock, now = parameter.detach(), after[name].detach()
        if name not in measured and stock.ndim > 1 and not torch.equal(stock, now):
            change = (now.double() - stock.double()).flatten(1)
            wide = change if change.shape[0] <= change.shape[1] else change.T
            squares = torch.linalg.eigvalsh(wide @ wide.T)  # of the singular values, for less than an SVD
            lines.append(_line(name, stock, squares.clamp_min(0).sqrt()))
    return lines


def _line(name: str, weight: Tensor, values: Tensor) -> dict[str, Any]:
    norm = float(values.square().sum().sqrt())
    stable = float((values / values.max()).square().sum()) if norm else 0.0
    return {"weight": name, "norm": float(weight.float().norm()), "change": norm, "stable_rank": stable}
