"""Trees and packs on any LM: all documents of a row in one forward pass, or one document after the other.

One pass needs an LM whose states depend only on the tokens that its mask shows and on their positions. Some LMs fail. Sliding
windows are lost if a mask is given. ALiBi counts columns. The states of Mamba, and convolutions, run through the whole row.
Each LM is therefore tried once, on a tree and a pack of few tokens. Its windows are read from its configuration. A row that
fits inside a window needs no try, because the window then shows everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base import console
from vismt.llm.tasks.pieces import Piece, collate_pieces
from vismt.lowrank.contexts import evaluating
from vismt.lowrank.model.named import disabled
from vismt.lowrank.model.record import record_of

LmForward = Callable[[Mapping[str, Tensor]], Tensor]  # from a batch with ids (b, n) to states (b, n, d)
WINDOWS = ("window", "window_size", "chunk_size")  # ends of the names of windows in configurations, in tokens
_reaches: dict[str, int] = {}
_named: set[str] = set()  # LMs for which the console has said that they run one document after the other


def by_document(lm: nn.Module, batch: Mapping[str, Tensor], run: LmForward) -> Tensor:
    """Return run(batch) (b, n, d). If the LM needs it, run one document of each row after the other.

    batch: Batch from `collate_pieces`, with a mask (b, n, n) if rows hold several documents.
    """
    mask = batch["mask"]
    if mask.ndim == 2 or mask.shape[1] <= (together := reach(lm, run)):
        return run(batch)
    name = type(lm).__name__
    if name not in _named:
        _named.add(name)
        longer = f" if they have more than {together} tokens" if together else ""
        console.stage(
            "model", f"{name} reads answers and packed texts one by one{longer}: in one pass their scores would differ"
        )
    return _one_by_one(batch, run)


def reach(lm: nn.Module, run: LmForward) -> int:
    """Return the longest packed row that the LM handles correctly, in tokens. 0 means that it cannot pack.

    Tried once for an LM.
    """
    config: Any = lm.config
    key = f"{type(lm).__name__} {config.to_json_string()}"
    if key not in _reaches:
        windows = [
            value
            for name, value in config.to_dict().items()
            if name.endswith(WINDOWS) and type(value) is int and value > 0
        ]
        _reaches[key] = min(windows, default=sys.maxsize) if _is_exact(lm, run) else 0
    return _reaches[key]


@torch.no_grad()
def _is_exact(lm: Any, run: LmForward) -> bool:
    """Return whether the documents of a tree and of a pack have the same states in one pass as alone."""
    ids = tuple(37 * place % lm.config.vocab_size for place in range(20))
    rows = [Piece(ids, ids, (0,) * 4 + (1,) * 12 + (2,) * 4, shared=4), Piece(ids, ids, (0,) * 12 + (1,) * 8)]
    device = next(lm.parameters()).device
    batch = {name: value.to(device) for name, value in collate_pieces(rows).items()}
    try:
        plain = disabled(lm) if record_of(lm) else nullcontext()
        with evaluating(lm), plain, torch.autocast(device.type, enabled=False):
            together, alone = run(batch).float(), _one_by_one(batch, run).float()
    except Exception:  # LMs without masks of this form fail in ways of their own
        return False
    error = (together - alone).norm() / alone.norm()
    return bool(error < torch.finfo(lm.dtype).eps ** 0.5)


def _one_by_one(batch: Mapping[str, Tensor], run: LmForward) -> Tensor:
    """Return the states (b, n, d) of one document of each row at a time, each after the tokens that it shares with others."""
    mask = batch["mask"]
    # Only the last token of a document sees itself, and it sees the whole document and what is shared.
    lasts = [row.nonzero().squeeze(1) for row in mask.sum(1) == 1]
    states: Tensor | None = None
    for number in range(max(map(len, lasts))):
        paths = [mask[row, last[min(number, len(last) - 1)]].nonzero().squeeze(1) for row, last in enumerate(lasts)]
        width = max(map(len, paths))
        columns = torch.stack([F.pad(path, (width - len(path), 0)) for path in paths])
        kept = torch.stack([F.pad(torch.ones_like(path), (width - len(path), 0)) for path in paths]).bool()
        found = run(_taken(batch, columns, kept))
        rows, places = kept.nonzero(as_tuple=True)
        if states is None:
            states = found.new_zeros(*mask.shape[:2], found.shape[2])
        states = states.index_put((rows, columns[kept]), found[rows, places])
    assert states is not None
    return states


def _taken(batch: Mapping[str, Tensor], columns: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return the tokens of a batch at some columns (b, m) as a batch of single documents. Tokens not kept (b, m) are padding."""
    part = {name: batch[name].gather(1, columns) * kept for name in ("ids", "positions")}
    part["mask"] = kept
    if "lower" in batch:
        part["lower"] = batch["lower"].take_along_dim(columns[..., None], 1) * kept[..., None]
    if "items" in batch:
        part["items"] = torch.where(kept, batch["items"].gather(1, columns), -1)
        if batch.get("vectors") is not None:
            numbers = (batch["items"] >= 0).flatten().cumsum(0).sub(1).view_as(batch["items"]).gather(1, columns)
            part["vectors"] = batch["vectors"][numbers[part["items"] >= 0]]
    return part
