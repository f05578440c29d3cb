"""Pieces of tokenised text with labels for the counted tokens, packing of several pieces into one, and batches of pieces.

A label stands at its token. A token with the label IGNORED is only context. Packed documents attend only to themselves.
Attention is block-diagonal, positions restart, and the first token of a document has no label, since the token before it
belongs to another document. A tree is a prompt followed by several answers. Each answer attends to the prompt and to itself, so
that the prompt runs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vismt.base.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """A sequence of n tokens.

    ids, labels: Numbers and labels of the tokens. documents: Document number of each token if several documents are packed,
    otherwise None. shared: Number of tokens at the start (document 0) that all documents of a tree attend to. items: Number of
    the item whose vector replaces each token, -1 for none. cut: Number of tokens that did not fit: of the prompt's beginning and
    of the answer's end.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    documents: tuple[int, ...] | None = None
    shared: int = 0
    items: tuple[int, ...] | None = None
    cut: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def counted(self) -> int:
        """Number of tokens with a label, without the first token, which no token predicts."""
        return sum(label != IGNORED for label in self.labels[1:])


def piece(context: Sequence[int], answer: Sequence[int], length: int) -> Piece:
    """Return a piece of context and answer. The answer is counted.

    If the two exceed `length`, the context loses its beginning. An answer that is too long loses its end.
    """
    kept_answer = list(answer)[: length - 1] if context else list(answer)[:length]
    kept = list(context)[max(0, len(context) + len(kept_answer) - length) :]
    cut = (len(context) - len(kept), len(answer) - len(kept_answer))
    return Piece((*kept, *kept_answer), (*[IGNORED] * len(kept), *kept_answer), cut=cut)


def windows(context: Sequence[int], text: Sequence[int], length: int) -> list[Piece]:
    """Split a text into pieces of `length` tokens that overlap by one token, so that every token is counted once.

    The first token of the text is counted only if there is context (a begin-of-text token) before it.
    """
    tokens = [*context, *text]
    labels = [*[IGNORED] * len(context), *text]
    pieces = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        part = slice(start, start + length)
        part_labels = [IGNORED, *labels[part][1:]] if start else labels[part]
        pieces.append(Piece(tuple(tokens[part]), tuple(part_labels)))
    return pieces


def pack(pieces: Sequence[Piece], length: int) -> list[Piece]:
    """Pack pieces, in order and uncut, into as few pieces of at most `length` tokens as this order allows."""
    groups: list[list[Piece]] = []
    room = 0
    for part in pieces:
        if not groups or len(part.ids) > room:
            groups.append([])
            room = length
        groups[-1].append(part)
        room -= len(part.ids)
    return [
        Piece(
            ids=tuple(token for piece in group for token in piece.ids),
            labels=tuple(label for piece in group for label in (IGNORED, *piece.labels[1:])),
            documents=tuple(number for number, piece in enumerate(group) for _ in piece.ids),
        )
        for group in groups
    ]


def tree(
    context: Sequence[int],
    answers: Sequence[Sequence[int]],
    length: int,
    items: Sequence[int] | None = None,
    answer_items: Sequence[Sequence[int]] | None = None,
) -> Piece:
    """Return the tree of a prompt and its answers.

    The prompt loses its beginning if it does not fit before the longest answer. items: Item numbers of the prompt's tokens.
    answer_items: Item numbers of the tokens of each answer.
    """
    room = length - max(len(answer) for answer in answers)
    prompt = list(context)[-room:] if room > 0 else []
    if not prompt or not all(answers):
        raise UserError(
            f"tasks: length {length}: no room for a prompt before an answer of {length - room} tokens; raise it."
        )
    tokens = [token for answer in answers for token in answer]
    documents = [0] * len(prompt) + [number for number, answer in enumerate(answers, 1) for _ in answer]
    within = [-1] * len(tokens) if answer_items is None else [number for numbers in answer_items for number in numbers]
    return Piece(
        ids=(*prompt, *tokens),
        labels=(*[IGNORED] * len(prompt), *tokens),
        documents=tuple(documents),
        shared=len(prompt),
        items=None if items is None else (*list(items)[-room:], *within),
        cut=(len(context) - len(prompt), 0),
    )


def stem(piece: Piece, answer: int) -> Piece:
    """Return the prompt of a tree with one of its answers as a piece without branches."""
    chosen = [position for position, number in enumerate(piece.documents or ()) if number in (0, answer + 1)]
    return select_tokens(piece, chosen)


def prune(piece: Piece, answers: Sequence[int]) -> Piece:
    """Return the tree with some of its answers, in the given order."""
    places = {answer + 1: place for place, answer in enumerate(answers, 1)}
    branches = piece.documents or ()
    kept = [position for position, number in enumerate(branches) if number == 0 or number in places]
    kept.sort(key=lambda position: places.get(branches[position], 0))
    documents = tuple(places.get(branches[position], 0) for position in kept)
    return replace(select_tokens(piece, kept), documents=documents, shared=piece.shared)


def select_tokens(piece: Piece, positions: Sequence[int]) -> Piece:
    """Return the tokens at some positions of a piece, with their labels and items, as a piece of one document."""
    return Piece(
        ids=tuple(piece.ids[position] for position in positions),
        labels=tuple(piece.labels[position] for position in positions),
        items=None if piece.items is None else tuple(piece.items[position] for position in positions),
        cut=piece.cut,
    )


def collate_pieces(pieces: Sequence[Piece], lower: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Return a batch of pieces, padded on the left.

    Args:
        pieces: Pieces of any lengths. n is the largest length.
        lower: Cached states (n, d) of each piece.

    Returns:
        Tensors by name: "ids", "labels" and "positions" int64 (b, n), and "mask" bool (b, n), or (b, n, n) if a piece is
        packed. With cached states "lower" (b, n, d). If a piece has items, "items" int64 (b, n), -1 for none. If a piece is a
        tree, "branch" int64 (b, n), 0 before the first answer, and "previous", the column that predicts each token.
    """

    def padded(rows: Iterable[Sequence[int]], value: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side="left")

    ids = padded(piece.ids for piece in pieces)
    labels = padded(((IGNORED, *piece.labels[1:]) for piece in pieces), IGNORED)  # no token predicts the first one
    mask = padded([1] * len(piece.ids) for piece in pieces).bool()
    documents = padded(piece.documents or [0] * len(piece.ids) for piece in pieces)
    width = ids.shape[1]
    columns = torch.arange(width)
    shared = torch.tensor([piece.shared for piece in pieces])[:, None]
    changes = (documents[:, 1:] != documents[:, :-1]) | ~mask[:, :-1]
    begins = mask & F.pad(changes, (1, 0), value=True)  # first token of every document
    # The offset of a document is the column of its first token, minus the prompt before an answer, whose positions
    # continue. cummax carries it to the other tokens.
    offsets = torch.zeros_like(documents)
    offsets[begins] = (columns - shared * (documents > 0))[begins]
    positions = (columns - offsets.cummax(1).values) * mask
    batch = {"ids": ids, "labels": labels, "positions": positions, "mask": mask}
    if any(piece.documents is not None for piece in pieces):
        # A token attends to the earlier tokens of its document and of the prompt of its tree.
        shown = (documents[:, :, None] == documents[:, None, :]) & mask[:, None, :]
        shown |= ((documents == 0) & mask & (shared > 0))[:, None, :]
        batch["mask"] = shown & torch.ones(width, width, dtype=torch.bool).tril()
    if any(piece.shared for piece in pieces):
        first_column = width - torch.tensor([len(piece.ids) for piece in pieces])[:, None]
        batch["branch"] = documents
        batch["previous"] = torch.where(begins & (documents > 0), first_column + shared, columns) - 1
    if any(piece.items is not None for piece in pieces):
        batch["items"] = padded((piece.items or [-1] * len(piece.ids) for piece in pieces), -1)
    if lower is not None:
        batch["lower"] = pad_sequence(list(lower), True, padding_side="left")
    return batch
