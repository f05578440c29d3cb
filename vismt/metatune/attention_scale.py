"""A factor on each head's attention logits, as rows of the fused query-key-value projection.

    a_h * (q_h k_h^T) / sqrt(d) = ((a_h q_h) k_h^T) / sqrt(d),    q_h = W_h x + b_h:    scale the rows of head h in W and b

The function is that of an attention whose logits are scaled, and the attention module stays the stock one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.linear import AdaptedLinear


@dataclass(frozen=True)
class QueryRows:
    """The queries of one attention: the first `rows` rows of `tensors` (names in the backbone), head after head."""

    heads: int
    rows: int
    tensors: tuple[str, ...]


def attention_heads(backbone: nn.Module) -> list[QueryRows]:
    """Every attention of the backbone with timm's fused qkv, stock or with a low-rank update.

    Raises UserError when there is none, and for one whose logits the rows of q do not scale.
    """
    found = []
    for path, module in backbone.named_modules():
        if not hasattr(module, "num_heads") or any(hasattr(part, "num_heads") for part in list(module.modules())[1:]):
            continue  # no attention, or what holds one
        qkv, reason = getattr(module, "qkv", None), ""
        if type(qkv) is not nn.Linear and not isinstance(qkv, AdaptedLinear):
            reason = "it has no fused qkv projection" if qkv is None else f"its qkv is {type(qkv).__name__}"
        elif not isinstance(getattr(module, "q_norm", None), nn.Identity | None):
            reason = "it normalises q, which undoes the factor"
        elif getattr(module, "q_bias", None) is not None:
            reason = "its bias of q lies outside of qkv"
        elif qkv.out_features % (3 * module.num_heads):
            reason = f"its qkv has {qkv.out_features} rows for {module.num_heads} heads"
        if reason:
            raise UserError(f"attention_scale: '{path}' ({type(module).__name__}): {reason}; use parameters='all'.")
        names = [name for name in ("weight", "bias", "lora_B", "lora_B0") if getattr(qkv, name, None) is not None]
        tensors = tuple(f"{path}.qkv.{name}" if path else f"qkv.{name}" for name in names)
        found.append(QueryRows(module.num_heads, qkv.out_features // 3, tensors))
    if not found:
        raise UserError(
            f"attention_scale: {type(backbone).__name__} has no attention with heads; use parameters='all'."
        )
    return found


def scaled_queries(tensor: Tensor, factor: Tensor, site: QueryRows) -> Tensor:
    """`tensor` (o, ...) with the rows of head h of the queries times factor[h]; factor (heads,). Differentiable in both."""
    rows = factor.repeat_interleave(site.rows // site.heads).to(tensor.dtype)
    queries = tensor[: site.rows] * rows.view(-1, *[1] * (tensor.ndim - 1))
    return torch.cat([queries, tensor[site.rows :]])
