"""Groups of images that a division keeps in one part: frames of one object, or one picture twice.

A card names the groups in a file, or they are found here. The patch of an image is its grey values, averaged over 16 x 16
boxes, shifted to mean 0 and scaled to length 1. Two images of a class are near-duplicates if the inner product of their
patches, a correlation, is above 0.9, and a group is what a chain of near-duplicates connects. Frames that differ in scale or by
motion correlate less and are not found. Another decoder of images can move a pair across the threshold. A file cannot.

Two images of any classes are copies of one picture if their patches of grey and colour values together correlate by more than
0.99. A chain of copies is always one group.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from vismt.base import console
from vismt.data.cards import load_card
from vismt.data.copies import first_copy
from vismt.data.images import ImageSet
from vismt.data.maps.dense_set import DenseSet, open_samples
from vismt.data.pixels import crop_square
from vismt.data.texts.interactions import numbered

S = TypeVar("S", ImageSet, DenseSet)

_SIDE = 16
CORRELATION = 0.9
COPY = 0.99  # with colours, because two classes may differ in their colour alone
_PLAIN = 1e-3  # a patch of less contrast has no correlations
_CHUNK = 1024
TILE, MARGIN = 64, 28  # pixels of an image of a contact sheet, and of the number of its row


def with_groups(images: S) -> S:
    """Return a set with its near-duplicates found, if its card does not name its groups. Every image is then decoded."""
    if images.groups is not None:
        return images
    labels = torch.zeros(len(images), dtype=torch.int64) if images.labels is None else images.labels
    read = images.read if isinstance(images, ImageSet) else partial(load_picture, images)
    found = near_duplicates(read, labels, images.name)
    return replace(images, groups={name: images.ids[first] for name, first in zip(images.ids, found.tolist())})


def groups_of(images: S) -> Tensor:
    """Return the group of each image of a set, int64 (n,): the index of the first image of its group."""
    groups = with_groups(images).groups or {}
    first: dict[Hashable, int] = {}
    named = [(groups[name],) if name in groups else name for name in images.ids]
    return torch.tensor([first.setdefault(group, i) for i, group in enumerate(named)], dtype=torch.int64)


def near_duplicates(read: Callable[[int], Tensor], labels: Tensor, name: str) -> Tensor:
    """Return the group of near-duplicates of each image, int64 (n,): the index of the first image of its group.

    name: Name of the set, for the console. Images of a class are compared in pairs. A class that is mostly one chain looks
    alike without being frames of one object, and only its copies are in groups. Copies are also found in different classes.
    """
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    def patches(i: int) -> tuple[Tensor, Tensor]:
        image = read(i).to(torch.float32)
        # the rounding errors of one plain surface are like the rounding errors of another
        least = _PLAIN * float(image.max())
        pooled = [F.adaptive_avg_pool2d(values, _SIDE).flatten() for values in (rgb_to_grayscale(image), image)]
        grey, colour = (F.normalize(values - values.mean(), dim=0, eps=least) for values in pooled)
        return grey, torch.cat([grey, colour]) / 2**0.5

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(patches, range(len(labels)))
        pairs = list(console.track(found, "data", f"{name}: near-duplicates", len(labels)))
    grey, colour = (torch.stack(values) for values in zip(*pairs))
    groups = torch.arange(len(labels))
    alike = 0
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chained = _chains(grey, members, CORRELATION)
        if 2 * int(chained.bincount().max()) > len(members) > 2:
            alike += 1
        else:
            groups[members] = chained
    if alike:
        console.stage("data", f"{name}: the images of {alike} classes are too alike to tell near-duplicates")
    copies = torch.arange(len(labels))
    likely = _with_copies(grey)
    copies[likely] = _chains(colour, likely, COPY)
    return _joined(groups, copies)


def _chains(patches: Tensor, members: Tensor, cut: float) -> Tensor:
    """Return the first image of the chain of each of `members`, ascending. A chain has correlations above `cut`."""
    first_of = members.new_empty(len(patches))
    rest = members
    while len(rest):
        first, fresh, rest = rest[0], rest[:1], rest[1:]
        first_of[fresh] = first
        while len(fresh):
            near = (patches[rest] @ patches[fresh[:_CHUNK]].T > cut).any(1)
            fresh, rest = torch.cat([fresh[_CHUNK:], rest[near]]), rest[~near]
            first_of[fresh] = first
    return first_of[members]


def _with_copies(patches: Tensor) -> Tensor:
    """Return the images, ascending, that have a patch like that of another image."""
    found = torch.zeros(len(patches), dtype=torch.bool)
    for start in range(0, len(patches), _CHUNK):
        near = patches[start : start + _CHUNK] @ patches[start:].T > COPY
        near.fill_diagonal_(False)
        found[start : start + _CHUNK] |= near.any(1)
        found[start:] |= near.any(0)
    return found.nonzero().flatten()


def _joined(groups: Tensor, others: Tensor) -> Tensor:
    """Return the first image of everything that two divisions into groups connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(groups)
    # scipy 1.11 ignores the error of its own search for indices of 64 bits, and connects everything.
    places = groups.int().numpy(), others.int().numpy()
    links = coo_array((torch.ones(n).numpy(), places), shape=(n, n))
    numbers = connected_components(links, directed=False)[1][groups.numpy()].tolist()
    first: dict[int, int] = {}
    return torch.tensor([first.setdefault(number, i) for i, number in enumerate(numbers)], dtype=torch.int64)


def load_picture(images: DenseSet, i: int) -> Tensor:
    """Return the image of a sample, float32 (3, h, w) in [0, 1]."""
    return images.stored(i)["image"]


@dataclass(frozen=True)
class Duplicates:
    """The near-duplicates of a set: groups of images, the largest first.

    total: Number of all images.
    """

    name: str
    total: int
    groups: list[list[tuple[DenseSet, int]]]

    @property
    def leaking(self) -> int:
        """Number of groups with images of several splits."""
        return sum(len({images.split for images, _ in group}) > 1 for group in self.groups)

    @property
    def mixed(self) -> int:
        """Number of groups with images of several classes."""
        return sum(len({_class_of(*entry) for entry in group}) > 1 for group in self.groups)


def _class_of(images: DenseSet, i: int) -> str:
    return images.image_classes[images.labels[i]] if images.labels is not None else ""


def find_duplicates(name: str | Path) -> Duplicates:
    """Return the near-duplicates of the first copy of a set, across its splits. Raise UserError like `open_samples`."""
    card = load_card(name)
    copy = first_copy(card, card.sources)
    sets = [open_samples(name, split) for split in (copy[0].splits if copy is not None else ["all"])]
    entries = [(images, i) for images in sets for i in range(len(images))]
    labels = torch.tensor(numbered([_class_of(*entry) for entry in entries]))
    found: dict[int, list[tuple[DenseSet, int]]] = {}
    for entry, group in zip(entries, near_duplicates(lambda i: load_picture(*entries[i]), labels, card.name).tolist()):
        found.setdefault(group, []).append(entry)
    groups = sorted((group for group in found.values() if len(group) > 1), key=len, reverse=True)
    return Duplicates(card.name, len(entries), groups)


def draw_groups(groups: Sequence[Sequence[tuple[DenseSet, int]]]) -> bytes:
    """Return a PNG with a numbered row of images for each group."""
    sheet = Image.new("RGB", (MARGIN + TILE * max(map(len, groups)), TILE * len(groups)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, group in enumerate(groups):
        draw.text((4, TILE * row + TILE // 2 - 6), str(row + 1), "black")
        for column, entry in enumerate(group):
            tile = crop_square(load_picture(*entry), TILE - 2).mul(255).round().to(torch.uint8)
            sheet.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (MARGIN + TILE * column, TILE * row))
    file = io.BytesIO()
    sheet.save(file, "png")
    return file.getvalue()
