"""Weights in 8 bits, to evaluate how much accuracy a quantised model loses, clean and under attacks through its own gradient.

    q = round(w / s) in -127..127,    s = max |w| / 127 of the output channel,    w <- s q

This is the symmetric scheme with one scale for each output channel (Krishnamoorthi, arXiv 1806.08342), on the weights of linear
layers and convolutions. Biases, norms, embeddings and activations stay in floating point. The values that int8 stores take the
place of the weights. The outputs are then the same as with dequantising in each forward pass, and the gradient to the images is
the gradient of the quantised model. Integer kernels, quantised activations and their speed are not modelled, because torch's
own dynamic quantisation has no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterModule

SCHEMES = ("int8",)
_LEVELS = 127


@torch.no_grad()
def quantise(model: nn.Module, what: str) -> None:
    """Replace the weights of a model's linear layers and convolutions by the values that int8 stores.

    what: Name of the model in errors. Raises UserError for an adapter that is not merged, and for a model without such layers.
    """
    if any(isinstance(module, AdapterModule) for module in model.modules()):
        raise UserError(f"quantise: {what} has an adapter that is not merged; only a merged model is stored in 8 bits.")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError(f"quantise: {what} has no linear layer and no convolution.")
    for layer in layers:
        layer.weight.copy_(int8(layer.weight))


def int8(weight: Tensor) -> Tensor:
    """Return the nearest values that int8 can store. weight: Weight (o, ...), with a scale for each of the o output channels.

    In half precision the scale and the levels are in float32, and the values are rounded once.
    """
    rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    scale = rows.abs().amax(1, keepdim=True) / _LEVELS
    return ((rows / torch.where(scale > 0, scale, 1)).round() * scale).view_as(weight).to(weight.dtype)
