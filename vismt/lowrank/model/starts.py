"""Start values of factors.

The start of each module comes from a generator of its own, so it depends on no other module and on no order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.contexts import each
from vismt.lowrank.layers.base import LayerSpec, adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.record import need_record

# Function (weight (o, i), rank, scale, generator) -> (A (r, i), B (o, r)), called once for each output block.
Initialiser = Callable[[Tensor, int, float, torch.Generator], tuple[Tensor, Tensor]]


def site_generator(seed: int, path: str) -> torch.Generator:
    """Return a CPU generator that depends on (seed, path) alone, so that the starts of modules are independent."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def start_layers(
    layers: Sequence[LowRankLayer],
    specs: Sequence[LayerSpec],
    init: Initialiser | Mapping[str, Initialiser],
    seed: int,
    offset: bool,
) -> None:
    """Fill all layers. On the CPU several layers are filled at a time."""

    def fill(pair: tuple[LowRankLayer, LayerSpec]) -> None:
        layer, spec = pair
        initialise(layer, spec, init[spec.path] if isinstance(init, Mapping) else init, seed, offset=offset)

    pairs = list(zip(layers, specs))
    if all(layer.weight.device.type == "cpu" for layer in layers):
        each(fill, pairs)
    else:
        for pair in pairs:
            fill(pair)


@torch.no_grad()
def initialise(layer: LowRankLayer, spec: LayerSpec, init: Initialiser, seed: int, *, offset: bool) -> None:
    """Fill a layer's factors block by block. On the meta device nothing is filled."""
    if layer.weight.is_meta:
        if offset:
            layer.set_factors(layer.lora_A, layer.lora_B, True)
        return
    generator, settings = site_generator(seed, spec.path), spec.settings
    try:
        blocks = layer.matrix(layer.stock_weight()).split(settings.blocks, 0)
        pairs = [init(rows, settings.rank, settings.scale, generator) for rows in blocks]
        finite = all(bool(factor.isfinite().all()) for pair in pairs for factor in pair)
    except torch.linalg.LinAlgError:
        finite = False
    if not finite:
        raise UserError(f"adapt: '{spec.path}' gets no finite start values; its weight is infinite or NaN somewhere.")
    A, B = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    padding = getattr(layer.shell, "padding_idx", None)
    if padding is not None:  # its row of B has no gradient, so that its vector never changes if the row is 0
        B[padding] = 0
    layer.set_factors(A, B, offset)
    layer.start_more(init, generator)


def fill_starts(model: nn.Module) -> nn.Module:
    """Give the factors of a model that was adapted on the meta device their start values, once the model has its base weights.

    Args:
        model: Model that was adapted on the meta device, made real by `to_empty`, and loaded with the weights of its base. It
            is changed in place.

    Returns:
        The model, as if it had been adapted with its weights.

    Raises:
        UserError: If the model was adapted with values, is still on the meta device, or has a method that needs more than the
            weights or places more than factors.
    """
    record = need_record(model, "fill_starts")
    part = next((spec.path for spec in record.specs if not spec.has_weight), None)
    if part is not None:
        raise UserError(
            f"fill_starts: '{record.method}' also starts '{part}', which is not a pair of factors; load the weights, then adapt."
        )
    layers: dict[str, Any] = dict(adapter_layers(model))
    if record.start is None or any(layer.weight.is_meta for layer in layers.values()):
        where = "was adapted with values" if record.start is None else "lies on the meta device"
        raise UserError(
            f"fill_starts: the model {where}; it is for one that was adapted on the meta device, after to_empty and its weights."
        )
    init, seed, offset = record.start
    start_layers([layers[spec.path] for spec in record.specs], record.specs, init, seed, offset)
    record.start = None
    return model
