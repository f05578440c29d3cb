"""GRU4Rec: the next item of a history from a recurrent net (Hidasi et al., arXiv 1511.06939), to compare with.

    h_t = GRU(item_t, h_(t-1))      user = W h at the last item      score of item i = user . item_i

Trained like SASRec (vismt.llm.ilora.sasrec.NextItem), by the softmax over all items, where the paper samples negatives from the
batch and ranks them by a pairwise loss; items are embedded, where it takes one-hot inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.llm.ilora.sasrec import item_scores, last_states


class GRU4Rec(nn.Module):
    """The recommender.

    Args:
        items: number of items in the catalogue.
        width: of item and user vectors and of the recurrent state.
        dropout: in [0, 1).
        seed: determines the start values; the global generator is left alone.
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

    def scores(self, users: Tensor, items: Tensor | None = None) -> Tensor:
        """Return the scores of users (b, d) for all items (b, items), or (b, c) for the given items int64 (b, c)."""
        return item_scores(self.item.weight, users, items)
