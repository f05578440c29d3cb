"""Batches of unchanged images, whose features a backbone that no training changes computes once for all nets on top of it."""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.data.batching import Gathered, InOrder
from vismt.metatune.features import FeatureStore, number


class StoredBatches(InOrder):
    """InOrder with the images marked as rows of a store (vismt/metatune/features.py); a context that writes the store."""

    def __init__(self, images: Gathered, batch: int) -> None:
        super().__init__(images, batch)
        self._store = FeatureStore(images.key)

    def __enter__(self) -> StoredBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, list[str]]:
        images, labels, ids = super().__getitem__(place)
        start = place * self.batch
        return number(images, self._store, torch.arange(start, start + len(images))), labels, ids
