"""The sets of images of a run, each opened once, and the division of the training sets into parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Literal, TypeVar

import torch
import xxhash
from torch import Tensor

from vismt.base import console
from vismt.base.objects import is_object
from vismt.data.cards import load_card
from vismt.data.decode import read_image_bytes
from vismt.data.division import divide, limited, unseen
from vismt.data.image_set import DECODED
from vismt.data.images import ImageSet, open_images
from vismt.data.maps.dense_sample import CLASS
from vismt.data.maps.dense_set import DenseSet, DenseSource, classified, open_dense
from vismt.data.near_duplicates import groups_of, load_picture, with_groups
from vismt.data.set_entries import card_and_split
from vismt.data.texts.interactions import numbered
from vismt.engine.parts import PartsConfig, shares

S = TypeVar("S", ImageSet, DenseSet)


class Sets:
    """Sets by entry, "card" or "card:split".

    Args:
        on_bad_sample, download: As in `open_images`.
    """

    def __init__(self, on_bad_sample: Literal["error", "skip"], download: bool) -> None:
        self._open = partial(open_images, on_bad_sample=on_bad_sample, download=download)
        self._images: dict[str, ImageSet] = {}
        self._samples: dict[tuple[str, str], DenseSet] = {}

    def images(self, entry: str, grouped: bool) -> ImageSet:
        """Return a set of labelled images. grouped: Whether near-duplicates are found if the card does not name groups."""
        if entry not in self._images:
            self._images[entry] = self._open(*card_and_split(entry))
        if grouped:
            self._images[entry] = with_groups(self._images[entry])
        return self._images[entry]

    def samples(self, entry: str, grouped: bool, key: str = CLASS) -> DenseSet:
        """Return the samples of a set of maps or of labelled images. key: Name of the class of labelled images."""
        card, split = card_and_split(entry)
        if is_object(card) or not load_card(card).sources_of(DenseSource):
            return classified(self.images(entry, grouped), key)
        if (card, split) not in self._samples:
            self._samples[card, split] = open_dense(card, split)
        if grouped:
            self._samples[card, split] = with_groups(self._samples[card, split])
        return self._samples[card, split]


def divided(parts: PartsConfig, open_set: Callable[[str, bool], S]) -> dict[str, list[tuple[S, Tensor]]]:
    """Return {part: its sets, each with the indices (int64, ascending) of its images} for "train", "validation" and "test".

    Shares are taken of each class, and images without a class count as one class. The limit then takes equally many training
    images of each class (`limited`). Their content is in no other part (`unseen`).

    open_set: Function from an entry, and whether near-duplicates are found, to the set.
    """
    kept = shares(parts)
    found: dict[str, list[tuple[S, Tensor]]] = {"train": [], "validation": [], "test": []}
    for images in [open_set(entry, bool(kept)) for entry in parts.train]:
        names = _class_names(images)
        labels = torch.zeros(len(images), dtype=torch.int64) if images.labels is None else images.labels
        groups = groups_of(images) if kept else None
        for part, index in divide(labels, kept, images.name, groups, names).items():
            found[part].append((images, index))
    for part in ("validation", "test"):
        named = [open_set(entry, True) for entry in getattr(parts, part)]
        found[part] += [(images, torch.arange(len(images))) for images in named]
    if found["train"]:
        found["train"] = _unseen(found, bool(kept))
    if parts.limit is not None:
        found["train"] = _limited(found["train"], parts.limit)
    return found


def _unseen(found: Mapping[str, list[tuple[S, Tensor]]], divided: bool) -> list[tuple[S, Tensor]]:
    """Return the training sets without the images whose content is also in another part."""
    entries = {part: [(images, int(i)) for images, index in sets for i in index] for part, sets in found.items()}
    contents = {part: [content_of(*entry) for entry in of] for part, of in entries.items()}
    groups = [
        (images.name, group) if (group := (images.groups or {}).get(images.ids[i])) is not None else None
        for images, i in entries["train"]
    ]
    name = "+".join(dict.fromkeys(images.name for images, _ in found["train"]))
    kept = unseen(contents["train"], contents["validation"] + contents["test"], name, groups, divided=divided)
    if not all(kept):
        text = f"{name}   {kept.count(False):,} of {len(kept):,} training images left out"
        console.stage(
            "data", f"{text}: they, or images of their group, are also in validation or test, by their content"
        )
    masks = torch.tensor(kept).split([len(index) for _, index in found["train"]])
    return [(images, index[mask]) for (images, index), mask in zip(found["train"], masks) if mask.any()]


def content_of(images: ImageSet | DenseSet, i: int) -> Hashable:
    """Return a digest of the file of an image, or of its pixels if several share a file.

    In a set of more than DECODED images, the name of an image identifies it.
    """
    if len(images) > DECODED:
        return images.name, images.ids[i]
    path = images.file(i)
    if path is not None:
        return xxhash.xxh3_128_digest(read_image_bytes(path))
    picture = images.read(i) if isinstance(images, ImageSet) else load_picture(images, i)
    return xxhash.xxh3_128_digest(picture.numpy().tobytes())


def _class_names(images: ImageSet | DenseSet) -> list[str]:
    return images.classes if isinstance(images, ImageSet) else images.image_classes


def _limited(sets: list[tuple[S, Tensor]], limit: int) -> list[tuple[S, Tensor]]:
    """Return the sets with the images that a limit keeps. A class is one class in all sets."""
    ids, classes = [], []
    for images, index in sets:
        names, rows = _class_names(images), index.tolist()
        ids += [f"{images.name}:{images.ids[i]}" for i in rows]
        classes += [names[images.labels[i]] if images.labels is not None else "" for i in rows]
    kept = torch.zeros(len(ids), dtype=torch.bool)
    kept[limited(torch.tensor(numbered(classes)), ids, limit)] = True
    masks = kept.split([len(index) for _, index in sets])
    return [(images, index[mask]) for (images, index), mask in zip(sets, masks) if mask.any()]
