"""A factor on each head's attention logits, as rows of the fused query-key-value projection.

    a_h * (q_h k_h^T) / sqrt(d) = ((a_h q_h) k_h^T) / sqrt(d),    q_h = W_h x + b_h:    scale the rows of head h in W and b

The function is that of an attention with scaled logits, and the attention module stays the stock one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.forms import LowRankLinear


@dataclass(frozen=True)
class QueryRows:
    """The queries of one attention: the first `rows` rows of `tensors` (names in the backbone), head after head."""

    heads: int
    rows: int
    tensors: tuple[str, ...]


def attention_heads(backbone: nn.Module) -> list[QueryRows]:
    """Return the query rows of every attention of a backbone with timm's fused qkv, stock or with a low-rank update.

    Raises UserError for a backbone without attention, and for an attention whose logits the rows of q do not scale.
    """
    attentions = []
    for path, module in backbone.named_modules():
        if not hasattr(module, "num_heads") or any(hasattr(part, "num_heads") for part in list(module.modules())[1:]):
            continue  # not an attention, or a module that contains one
        qkv = getattr(module, "qkv", None)
        reason = _unsupported(module, qkv)
        if reason:
            raise UserError(f"attention_scale: '{path}' ({type(module).__name__}): {reason}; use parameters='all'.")
        names = [name for name in ("weight", "bias", "lora_B", "lora_B0") if getattr(qkv, name, None) is not None]
        tensors = tuple(f"{path}.qkv.{name}" if path else f"qkv.{name}" for name in names)
        attentions.append(QueryRows(module.num_heads, qkv.out_features // 3, tensors))
    if not attentions:
        raise UserError(
            f"attention_scale: {type(backbone).__name__} has no attention with heads; use parameters='all'."
        )
    return attentions


def _unsupported(module: nn.Module, qkv: nn.Module | None) -> str:
    """Return why the rows of q in `qkv` do not scale the logits of this attention; "" where they do."""
    if type(qkv) is not nn.Linear and not isinstance(qkv, LowRankLinear):
        return "it has no fused qkv projection" if qkv is None else f"its qkv is {type(qkv).__name__}"
    if not isinstance(getattr(module, "q_norm", None), nn.Identity | None):
        return "it normalises q, which undoes the factor"
    if getattr(module, "q_bias", None) is not None:
        return "its bias of q lies outside of qkv"
    if qkv.out_features % (3 * module.num_heads):
        return f"its qkv has {qkv.out_features} rows for {module.num_heads} heads"
    return ""


def scaled_queries(tensor: Tensor, factor: Tensor, site: QueryRows) -> Tensor:
    """Multiply the query rows of head h in `tensor` (o, ...) by factor[h]; factor (heads,). Differentiable in both."""
    rows = factor.repeat_interleave(site.rows // site.heads).to(tensor.dtype)
    queries = tensor[: site.rows] * rows.view(-1, *[1] * (tensor.ndim - 1))
    return torch.cat([queries, tensor[site.rows :]])
