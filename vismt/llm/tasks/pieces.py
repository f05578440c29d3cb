"""Tokens of one row of text with what of them is counted, several packed into one, and batches of them.

A label stands at its token; where it is IGNORE the token is context only. Packed documents see themselves alone: attention
is block-diagonal, positions begin anew, and a document's first token has no label, since the token before it belongs to
another. A tree is a prompt with several answers after it, each of which sees the prompt and itself: the prompt runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Piece:
    """ids and labels of n tokens; documents: the number of each token's document where several are packed, else None.

    shared: the first tokens, document 0, that all documents of a tree see. items: at each token the number of the item whose
    vector takes its place, -1 for none.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    documents: tuple[int, ...] | None = None
    shared: int = 0
    items: tuple[int, ...] | None = None

    @property
    def counted(self) -> int:
        """Tokens with a label, which the first one never has: nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


def piece(context: Sequence[int], answer: Sequence[int], length: int) -> Piece:
    """Context and answer, of which the answer is counted; what is too long loses its beginning, the answer its end."""
    answer = list(answer)[: length - 1] if context else list(answer)[:length]
    context = list(context)[max(0, len(context) + len(answer) - length) :]
    return Piece((*context, *answer), (*[IGNORE] * len(context), *answer))


def windows(context: Sequence[int], text: Sequence[int], length: int) -> list[Piece]:
    """A long text in pieces of `length` tokens that overlap by one, so that every token is counted once.

    The first token of all is counted only where there is context (a begin-of-text token) before it.
    """
    tokens = [*context, *text]
    labels = [*[IGNORE] * len(context), *text]
    found = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        part = slice(start, start + length)
        kept = [IGNORE, *labels[part][1:]] if start else labels[part]
        found.append(Piece(tuple(tokens[part]), tuple(kept)))
    return found


def pack(pieces: Sequence[Piece], length: int) -> list[Piece]:
    """The pieces in their order, as many to one piece as `length` tokens hold; none of them is cut."""
    found: list[Piece] = []
    held: list[Piece] = []
    for one in [*pieces, None]:
        if one is None or sum(len(other.ids) for other in held) + len(one.ids) > length:
            if held:
                found.append(_joined(held))
            held = []
        if one is not None:
            held.append(one)
    return found


def tree(
    context: Sequence[int], answers: Sequence[Sequence[int]], length: int, items: Sequence[int] | None = None
) -> Piece:
    """A prompt with each of the answers after it; a prompt that is too long for the longest one loses its beginning."""
    room = length - max(len(answer) for answer in answers)
    kept = list(context)[-room:] if room > 0 else []
    if not kept or not all(answers):
        raise UserError(
            f"tasks: length {length}: no room for a prompt before an answer of {length - room} tokens; raise it."
        )
    tokens = [token for answer in answers for token in answer]
    documents = [0] * len(kept) + [number for number, answer in enumerate(answers, 1) for _ in answer]
    places = None if items is None else (*list(items)[-room:], *[-1] * len(tokens))
    return Piece((*kept, *tokens), (*[IGNORE] * len(kept), *tokens), tuple(documents), len(kept), places)


def stem(piece: Piece, answer: int) -> Piece:
    """The prompt of a tree with one of its answers, as a piece without branches."""
    chosen = [place for place, number in enumerate(piece.documents) if number in (0, answer + 1)]
    ids, labels = (tuple(values[place] for place in chosen) for values in (piece.ids, piece.labels))
    return Piece(ids, labels, items=None if piece.items is None else tuple(piece.items[place] for place in chosen))


def _joined(pieces: Sequence[Piece]) -> Piece:
    ids = tuple(token for one in pieces for token in one.ids)
    labels = tuple(label for one in pieces for label in (IGNORE, *one.labels[1:]))
    return Piece(ids, labels, tuple(number for number, one in enumerate(pieces) for _ in one.ids))


def collate(pieces: Sequence[Piece], lower: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """ids, labels, positions int64 (b, n), padded on the left; mask bool (b, n), or (b, n, n) where a piece is packed.

    lower: (n, d) of each piece, which become "lower" (b, n, d). Where a piece has items, "items" int64 (b, n), -1 for none.
    Where a piece is a tree, "branch" int64 (b, n), 0 before the first answer, and "previous", the column that predicts each.
    """
    width = max(len(one.ids) for one in pieces)
    shape = (len(pieces), width)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    mask, documents = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
    for row, one in enumerate(pieces):
        start = width - len(one.ids)
        ids[row, start:], labels[row, start:] = torch.tensor(one.ids), torch.tensor(one.labels)
        labels[row, start] = IGNORE  # with padding before it, something would predict it
        mask[row, start:] = True
        if one.documents is not None:
            documents[row, start:] = torch.tensor(one.documents)
    before = torch.zeros(shape, dtype=torch.int64)
    # Tokens before the document's first: its first place in the row. cummax carries it to the document's other tokens.
    begins = mask & torch.cat(
        [torch.ones(len(pieces), 1, dtype=torch.bool), (documents[:, 1:] != documents[:, :-1]) | ~mask[:, :-1]], 1
    )
    shared = torch.tensor([one.shared for one in pieces])[:, None]
    before[begins] = (torch.arange(width) - shared * (documents > 0))[
        begins
    ]  # an answer's positions go on from the prompt's
    positions = (torch.arange(width) - before.cummax(1).values) * mask
    batch = {"ids": ids, "labels": labels, "positions": positions, "mask": mask}
    if any(one.documents is not None for one in pieces):
        same = (documents[:, :, None] == documents[:, None, :]) & mask[:, None, :]
        same |= ((documents == 0) & mask & (shared > 0))[:, None, :]
        batch["mask"] = same & torch.ones(width, width, dtype=torch.bool).tril()
    if any(one.shared for one in pieces):
        start = width - torch.tensor([len(one.ids) for one in pieces])[:, None]
        batch["branch"] = documents
        batch["previous"] = torch.where(begins & (documents > 0), start + shared, torch.arange(width)) - 1
    if any(one.items is not None for one in pieces):
        batch["items"] = torch.stack(
            [torch.tensor([*[-1] * (width - len(one.ids)), *(one.items or [-1] * len(one.ids))]) for one in pieces]
        )
    if lower is not None:
        batch["lower"] = torch.stack([torch.cat([one.new_zeros(width - len(one), one.shape[1]), one]) for one in lower])
    return batch
