"""The door to images with per-pixel maps: `open_dense` finds a card's copy and returns a `DenseSet`.

A set of image classification can be opened as one, too: its samples hold the image and its class (`classified`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vismt.data.cards import Card, load_card
from vismt.data.images import ImageSet, open_images
from vismt.data.maps.dense_sample import CLASS, Sample
from vismt.data.maps.dense_set import DenseSet, DenseSource
from vismt.data.source_types import NONE
from vismt.data.sources import first_copy, not_found, sources_for

__all__ = ["DenseSet", "classified", "open_dense", "open_samples"]


def open_dense(card: Card | str | Path, split: str = "all", *, root: Path | None = None) -> DenseSet:
    """Return the samples of `split`, from the first of the card's sources that is on this machine.

    Args:
        card: a card, its name, its file or its folder.
        split: name of a split, or "all" for every split.
        root: folder of the set itself, instead of a search in VISMT_DATA and the cache.

    Raises:
        UserError: a missing set, split or map of an image, and another number of images than the card says. Reading a sample
            raises for a damaged file, a map of another size and values that the map cannot hold; the error names the file.
    """
    card = card if isinstance(card, Card) else load_card(card)
    copy = first_copy(card, sources_for(card, DenseSource, split), root)
    if copy is None:
        raise not_found(card, split, root)
    source, base = copy
    return replace(source.load(card, base, split), groups=card.read_groups(NONE))


def classified(images: ImageSet) -> DenseSet:
    """Return a set of image classification as samples of an image, in its own size, and its class."""

    def stored(i: int) -> Sample:
        return {"image": images.read(i).to(torch.float32) / 255, CLASS: images.labels[i]}

    return DenseSet(
        images.name,
        images.split,
        [],
        [CLASS],
        images.ids,
        stored,
        where=images.where,
        image_classes=images.classes,
        labels=images.labels,
        groups=images.groups,
    )


def open_samples(card: str | Path, split: str = "all") -> DenseSet:
    """Return the samples of any card, of maps or of classified images. Raises as open_dense and open_images do."""
    loaded = load_card(card)
    return open_dense(loaded, split) if loaded.sources_of(DenseSource) else classified(open_images(loaded, split))
