"""SASRec: the next item of a history by self-attention (Kang & McAuley, arXiv 1808.09781), for iLoRA's gates and item vectors.

    S = dropout(item + position)     per block: Q = LN(S), A = Q + attention(Q, S, S; causal), S = LN(A) + W2 relu(W1 LN(A))
    user = LN(S) at the last item    score of item i = user . item_i    loss = -log softmax over all items at the next one

The paper draws one negative item for each position and takes a binary loss; here the softmax runs over all items, which is
exact and cheap for catalogues of some ten thousands. A history stands on the left, padding (-1) on the right of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError


class SASRec(nn.Module):
    """items: how many there are; length: of the longest history. Drawn from `seed` alone. Raises UserError for sizes below 1."""

    def __init__(
        self,
        items: int,
        length: int,
        width: int = 64,
        blocks: int = 1,
        heads: int = 1,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(items, length, width, blocks, heads) < 1 or width % heads or not 0 <= dropout < 1:
            raise UserError(
                f"recommender: width {width}, blocks {blocks}, heads {heads}, dropout {dropout:g}: whole numbers of at least 1, "
                "heads that divide the width, and a dropout in [0, 1)."
            )
        self.dropout = dropout
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.item, self.position = nn.Embedding(items, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(blocks))
            self.norm = nn.LayerNorm(width)
            for table in (self.item, self.position):
                nn.init.normal_(table.weight, std=1 / math.sqrt(width))

    @property
    def width(self) -> int:
        """Of a user's and an item's vector."""
        return self.item.weight.shape[1]

    def forward(self, history: Tensor) -> Tensor:
        """History int64 (b, n), numbers of items, -1 after the last -> users (b, d): the state at the last item.

        Raises UserError for an empty history and for one that is too long.
        """
        present = history >= 0
        n = history.shape[1]
        if n > len(self.position.weight) or not bool(present[:, 0].all()):
            raise UserError(
                f"recommender: histories of 1 to {len(self.position.weight)} items are needed, these have up to {n}."
            )
        states = self.item(history.clamp_min(0)) + self.position.weight[:n]
        states = F.dropout(states, self.dropout, self.training) * present[..., None]
        causal = torch.ones(n, n, dtype=torch.bool, device=history.device).tril()
        for block in self.blocks:
            states = block(states, causal) * present[..., None]
        last = present.sum(1) - 1
        return self.norm(states[torch.arange(len(states), device=states.device), last])

    def scores(self, users: Tensor, items: Tensor | None = None) -> Tensor:
        """Users (b, d) -> (b, all items), or (b, c) of the items int64 (b, c)."""
        if items is None:
            return users @ self.item.weight.T
        return torch.einsum("bd,bcd->bc", users, self.item(items))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, causal: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d). What follows the last item is masked by being after it."""
        queries = self.query_norm(states)
        parts = [
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(queries), self.key(states), self.value(states))
        ]
        mixed = F.scaled_dot_product_attention(
            *parts, attn_mask=causal, dropout_p=self.dropout if self.training else 0.0
        )
        states = self.norm(queries + mixed.transpose(1, 2).flatten(2))
        inner = F.dropout(self.inner(states).relu(), self.dropout, self.training)
        return states + F.dropout(self.outer(inner), self.dropout, self.training)


class NextItem(nn.Module):
    """objective({"history" (b, n), "next" (b,)}) -> the loss over all items, and how often the next one is the first."""

    def __init__(self, recommender: SASRec) -> None:
        super().__init__()
        self.recommender = recommender

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = self.recommender.scores(self.recommender(batch["history"]))
        return {
            "loss": F.cross_entropy(scores, batch["next"]),
            "first": (scores.argmax(1) == batch["next"]).float().mean(),
        }


def padded(histories: list[list[int]]) -> Tensor:
    """int64 (b, longest), -1 after the last item of each."""
    found = torch.full((len(histories), max(map(len, histories))), -1)
    for row, history in zip(found, histories):
        row[: len(history)] = torch.tensor(history, dtype=torch.int64)
    return found
