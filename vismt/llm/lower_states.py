"""The output of frozen lower blocks on fixed texts, kept in the cache folder for later runs and other processes.

    key: the texts, and the identity of the LM but for block `first` and above      (vismt.storage.stored_tensors)

One file has the states of all pieces that are asked for together, since the sums of a state depend on the texts of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.base.identity import Identity
from vismt.llm.net import LmNet, blocks
from vismt.llm.tasks.pieces import Piece
from vismt.storage.stored_tensors import has_hooks, machine, path_of, read_stored, write_stored


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
    if has_hooks(base.modules()):
        return None
    return path_of(repr((net.first, texts)), Identity(base, skip=upper), machine(net.lm.device))
