"""Scores of candidates without a trained net for the history, to compare recommenders with.

    popularity    log(1 + number of training rows whose next item is c)
    recency       cos(e_c, e_last)               the last item of the history alone
    mean-item     cos(e_c, mean over the history of e_i)

e: item vectors of a trained recommender.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ITEM_BASELINES = ("popularity", "recency", "mean-item")


def popularity_scores(next_items: Sequence[int], candidates: Tensor, items: int) -> Tensor:
    """Return log(1 + count) (b, c) of candidates int64 (b, c), from the next items of all training rows."""
    counts = torch.bincount(torch.tensor(next_items, dtype=torch.int64), minlength=items)
    return counts[candidates].double().log1p()


def cosine_scores(vectors: Tensor, histories: Tensor, candidates: Tensor, last: bool) -> Tensor:
    """Return the cosines (b, c) between candidates int64 (b, c) and the mean vector of their histories, or their last item's.

    Args:
        vectors: (items, d).
        histories: int64 (b, n), -1 after the last item.
        candidates: int64 (b, c).
        last: whether the last item counts alone.
    """
    present = histories >= 0
    if last:
        present = present & (present.sum(1, keepdim=True) == torch.arange(1, histories.shape[1] + 1))
    weights = present.double() / present.sum(1, keepdim=True)
    queries = torch.einsum("bn,bnd->bd", weights, vectors[histories.clamp_min(0)].double())
    return F.cosine_similarity(queries[:, None], vectors[candidates].double(), dim=2)
