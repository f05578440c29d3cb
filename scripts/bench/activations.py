"""Activations that training a decoder keeps for the backward pass, by formula.

For RMSNorm, rotary attention (SDPA) and gated FFN, without checkpointing:

    numbers for each token of a block, with q = n d, k = n_kv d (for n_kv = n: 2 q + 2 k = 4 h)
    trained             6 h + 2 q + 2 k + 4 I + n + 2
    frozen              2 h + 2 q + 2 k + 3 I + n + 2           a gradient passes, no weight has one
    LoRA on all seven   4 h + 2 q + 2 k + 4 I + n + 2 + 7 r     all inputs of linears, for A
    slices of O and D   frozen + selected inputs
    below the first block that trains, with frozen embeddings: nothing

n heads of width d, n_kv for keys and values, hidden size h, FFN width I. The block of transformers' Llama and Qwen2 in fp32;
half precision keeps some of the h terms twice, because the norms compute in fp32. The frozen part cannot go lower: attention
needs q, k, v and its output, the FFN both branches, the norms their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FP32, INT64 = 4, 8  # bytes of a number, and of a token id or label


@dataclass(frozen=True)
class Decoder:
    """Sizes of a model: h, I, n, n_kv, d and the vocabulary."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class BlockTraining:
    """How a block trains: "trained", "frozen", "lora" with its rank, or "sliced" with its numbers of inputs of O and D."""

    kind: str
    rank: int = 0
    sliced: tuple[int, int] = (0, 0)


def decoder_activation_bytes(
    model: Decoder,
    batch: int,
    length: int,
    blocks: Sequence[BlockTraining],
    *,
    embeddings: bool,
    norm: bool,
    head: bool,
) -> int:
    """Return the bytes that one forward pass with its cross-entropy over `batch` x `length` tokens keeps.

    Args:
        model: sizes of the decoder.
        batch: number of sequences.
        length: tokens of each.
        blocks: how each block trains, from the first to the last.
        embeddings, norm, head: whether the input embeddings, the final norm and the head are trained.
    """
    h, tokens = model.hidden, batch * length
    flows, rotary, numbers = embeddings, False, 0  # numbers: kept for each token
    for block in blocks:
        opens = block.kind in ("trained", "lora") or flows  # whether attention is differentiated
        numbers += _block(model, block, flows)
        rotary |= opens
        flows |= block.kind != "frozen"
    numbers += flows * (h + 1) + norm * h + head * h
    trains = flows or norm or head
    numbers += trains * model.vocabulary
    together = tokens * numbers + rotary * 2 * length * model.head_dim + trains  # the last is the loss's divisor
    return FP32 * together + INT64 * tokens * (embeddings + trains)


def _block(model: Decoder, block: BlockTraining, flows: bool) -> int:
    """Return the numbers kept for each token. flows: whether the block's input needs a gradient."""
    h, q, k = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention, ffn = 2 * q + 2 * k + model.heads, 3 * model.ffn
    entry = flows * (h + 1)  # a norm keeps its input and the root mean square for the gradient of that input alone
    if block.kind == "frozen":
        return flows * (entry + attention + h + 1 + ffn)
    if block.kind == "sliced":
        to_attention, to_ffn = block.sliced
        middle = flows or to_attention > 0
        return flows * (entry + attention) + middle * (h + 1 + ffn) + to_attention + to_ffn
    linears = h + h + model.ffn  # inputs of q, k, v; of gate, up; of down. That of o is attention's own output
    # A trained norm keeps what it multiplies by its weight.
    trained = 7 * block.rank if block.kind == "lora" else 2 * h
    return entry + attention + h + 1 + ffn + linears + trained
