"""The output of frozen lower blocks on fixed texts, kept in the cache folder for later runs and other processes.

    key: the texts, the LM's configuration, its tensors but for those of block `first` and above      (vismt.stored_tensors)

One file has the states of all pieces that are asked for together, since the sums of a state depend on the texts of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.llm.documents import reach
from vismt.llm.net import LmNet, blocks
from vismt.llm.tasks.pieces import Piece
from vismt.stored_tensors import path_of, read_stored, write_stored


def lower_states(net: LmNet, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the input (n, d) of block `net.first` for each piece, computed once; pieces of the same text share one tensor."""
    texts = {(piece.ids, piece.documents): piece for piece in pieces}
    path = _path(net, list(texts))
    stored = None if path is None else read_stored(path)
    if stored is None:
        states = net.lower_states(list(texts.values()))
        if path is not None:
            write_stored(path, {"states": torch.cat(states)})
    else:
        states = list(stored["states"].split([len(ids) for ids, _ in texts]))
    by_text = dict(zip(texts, states))
    return [by_text[piece.ids, piece.documents] for piece in pieces]


def _path(net: LmNet, texts: Sequence[tuple[Any, ...]]) -> Path | None:
    """Return the file for the states of texts; None where the code of a lower block is not a library's own."""
    base: Any = net.lm.base_model
    upper = blocks(net.lm)[net.first :]
    above = {id(tensor) for block in upper for tensor in (*block.parameters(), *block.buffers())}
    tensors = {name: t for name, t in (*base.named_parameters(), *base.named_buffers()) if id(t) not in above}
    lower: list[nn.Module] = [net.lm.get_input_embeddings(), *blocks(net.lm)[: net.first]]
    longest = max((len(ids) for ids, documents in texts if documents), default=0)
    way = " one by one" if longest and longest > reach(net.lm, net.states) else ""
    return path_of(lower, tensors, f"{type(base).__qualname__} {base.config.to_json_string()} {net.first} {texts}{way}")
