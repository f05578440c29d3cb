"""Recommenders of the next item of a history: SASRec, GRU4Rec, and scores without a trained net.

    user = net(history)       score of item i = user . item_i       loss = -log softmax over all items at the next one

SASRec (Kang & McAuley, arXiv 1808.09781) feeds iLoRA and LLaRA. Its user vectors are the input of iLoRA's gates, and its item
embeddings become item vectors of the LM. The other recommenders are compared with it.

    SASRec        S = dropout(item + position), user = LN(S) at the last item; in each block
                  Q = LN(S), A = Q + attention(Q, S, S; causal), S = LN(A) + W2 relu(W1 LN(A))
    GRU4Rec       h_t = GRU(item_t, h_(t-1)), user = W h at the last item     (Hidasi et al., arXiv 1511.06939)
    popularity    log(1 + number of training rows whose next item is c)
    recency       cos(e_c, e_last)                            the last item of the history alone, e the item vectors of SASRec
    mean-item     cos(e_c, mean over the history of e_i)

SASRec's paper draws one negative item for each position and uses a binary loss. GRU4Rec's paper samples negatives from the
batch and ranks them by a pairwise loss, with one-hot inputs. Here items are embedded and the softmax runs over all items, which
is exact and cheap for catalogues of some ten thousand items. Histories are padded on the right with -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vismt.base.errors import UserError

ITEM_BASELINES = ("popularity", "recency", "mean-item")


class ItemRecommender(nn.Module):
    """A net that maps histories int64 (b, n), with -1 after the last item, to users (b, d).

    item: Item vectors.
    """

    item: nn.Embedding

    @property
    def width(self) -> int:
        """Width of item and user vectors."""
        return self.item.weight.shape[1]

    def scores(self, users: Tensor, items: Tensor | None = None) -> Tensor:
        """Return the scores of users (b, d) for all items (b, items), or (b, c) for the given items int64 (b, c)."""
        if items is None:
            return users @ self.item.weight.T
        return torch.einsum("bd,bcd->bc", users, self.item.weight[items])


class SASRec(ItemRecommender):
    """Self-attentive sequential recommendation.

    Args:
        items: Number of items in the catalogue.
        length: Number of items of the longest history.
        width: Width of item and user vectors, a multiple of `heads`.
        blocks: Number of attention blocks.
        heads: Number of attention heads in a block.
        dropout: Probability of dropout, in [0, 1).
        seed: Seed of the start values. The global generator is left alone.

    Raises:
        UserError: If a size is below 1, the heads do not divide the width, or the dropout is outside [0, 1).
    """

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
            self.item = nn.Embedding(items, width)
            self.position = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(blocks))
            self.norm = nn.LayerNorm(width)
            for table in (self.item, self.position):
                nn.init.normal_(table.weight, std=1 / math.sqrt(width))

    def forward(self, history: Tensor) -> Tensor:
        """Return users (b, d), the state at the last item of each history.

        history: Item numbers int64 (b, n), -1 after the last. Raise UserError for a history that is empty or too long.
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
        return self.norm(last_states(states, history))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, states: Tensor, causal: Tensor) -> Tensor:
        """Map states (b, n, d) to (b, n, d). The causal mask (n, n) also hides the padding after the last item."""
        queries = self.query_norm(states)
        query, key, value = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(states), self.value(states))
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=causal, dropout_p=self.dropout if self.training else 0.0
        )
        states = self.norm(queries + mixed.transpose(1, 2).flatten(2))
        inner = F.dropout(self.inner(states).relu(), self.dropout, self.training)
        return states + F.dropout(self.outer(inner), self.dropout, self.training)


class GRU4Rec(ItemRecommender):
    """A recurrent recommender.

    Args:
        items: Number of items in the catalogue.
        width: Width of item vectors, user vectors and the recurrent state.
        dropout: Probability of dropout, in [0, 1).
        seed: Seed of the start values. The global generator is left alone.
    """

    def __init__(self, items: int, width: int = 64, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.dropout = dropout
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.item = nn.Embedding(items, width)
            nn.init.normal_(self.item.weight, std=1 / math.sqrt(width))
            self.recurrent = nn.GRU(width, width, batch_first=True)
            self.user = nn.Linear(width, width)

    def forward(self, history: Tensor) -> Tensor:
        """Return users (b, d) of histories int64 (b, n), -1 after the last item."""
        states = F.dropout(self.item(history.clamp_min(0)), self.dropout, self.training)
        return self.user(last_states(self.recurrent(states)[0], history))


def last_states(states: Tensor, history: Tensor) -> Tensor:
    """Return the states (b, d) at the last item of histories (b, n) from the states (b, n, d) at all items."""
    last = (history >= 0).sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


class NextItem(nn.Module):
    """Objective of a recommender: batch {"history" (b, n), "next" (b,)} -> {"loss", "first"}.

    loss: Cross-entropy over all items. first: Share of rows whose next item has the highest score.
    """

    def __init__(self, recommender: ItemRecommender) -> None:
        super().__init__()
        self.recommender = recommender

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = self.recommender.scores(self.recommender(batch["history"]))
        first = (scores.argmax(1) == batch["next"]).float().mean()
        return {"loss": F.cross_entropy(scores, batch["next"]), "first": first}


def pad_histories(histories: list[list[int]]) -> Tensor:
    """Return histories as int64 (b, longest), with -1 after the last item of each history."""
    return pad_sequence([torch.tensor(history, dtype=torch.int64) for history in histories], True, -1)


def popularity_scores(next_items: Sequence[int], candidates: Tensor, items: int) -> Tensor:
    """Return log(1 + count) (b, c) of candidates int64 (b, c), from the next items of all training rows."""
    counts = torch.bincount(torch.tensor(next_items, dtype=torch.int64), minlength=items)
    return counts[candidates].double().log1p()


def cosine_scores(vectors: Tensor, histories: Tensor, candidates: Tensor, last: bool) -> Tensor:
    """Return the cosines (b, c) between candidates int64 (b, c) and the mean vector of their histories, or of the last item.

    Args:
        vectors: Item vectors (items, d).
        histories: Item numbers int64 (b, n), -1 after the last item.
        candidates: Item numbers int64 (b, c).
        last: Whether only the last item counts.
    """
    present = histories >= 0
    if last:
        present = present & (present.sum(1, keepdim=True) == torch.arange(1, histories.shape[1] + 1))
    weights = present.double() / present.sum(1, keepdim=True)
    queries = torch.einsum("bn,bnd->bd", weights, vectors[histories.clamp_min(0)].double())
    return F.cosine_similarity(queries[:, None], vectors[candidates].double(), dim=2)
