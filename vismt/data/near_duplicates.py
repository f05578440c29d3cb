"""Groups of images that a division keeps in one part: frames of one object, or one picture twice.

A card names them in a file, or they are found here. The patch of an image is its grey values, averaged over 16 x 16 boxes,
shifted to mean 0 and scaled to length 1. Two images of a class are near-duplicates where the inner product of their patches, a
correlation, is above 0.9, and a group is what a chain of near-duplicates connects. Frames that differ in scale or by motion
correlate less and are not found. Another decoder of images can move a pair that lies at the threshold; a file cannot.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from vismt.base import console
from vismt.data.cards import load_card
from vismt.data.copies import first_copy
from vismt.data.images import ImageSet
from vismt.data.maps.dense_set import DenseSet, open_samples
from vismt.data.pixels import square
from vismt.data.texts.interactions import numbered

SIDE = 16
CORRELATION = 0.9
CHUNK = 1024
TILE, MARGIN = 64, 28  # pixels of an image of a contact sheet, and of the number of its row


def groups_of(images: ImageSet | DenseSet, labels: Tensor, read: Callable[[int], Tensor]) -> Tensor:
    """Return the group of each image of a set, int64 (n,): the index of the first image of its group.

    Those that its card names, else near-duplicates; then every image is decoded. labels: int64 (n,). read: image i, (3, h, w).
    """
    if images.groups is None:
        return near_duplicates(read, labels, images.name)
    first: dict[Any, int] = {}
    named = [(images.groups[name],) if name in images.groups else name for name in images.ids]
    return torch.tensor([first.setdefault(group, i) for i, group in enumerate(named)], dtype=torch.int64)


def near_duplicates(read: Callable[[int], Tensor], labels: Tensor, name: str) -> Tensor:
    """Return the group of near-duplicates of each image as `groups_of` does; name: of the set, for the console.

    Images of a class are compared each with each. A class that is one chain for the most part looks alike without being frames
    of one object, and has no groups.
    """
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    def patch(i: int) -> Tensor:
        grey = F.adaptive_avg_pool2d(rgb_to_grayscale(read(i).to(torch.float32)), SIDE).flatten()
        return F.normalize(grey - grey.mean(), dim=0)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(patch, range(len(labels)))
        patches = torch.stack(list(console.track(found, "data", f"{name}: near-duplicates", len(labels))))
    groups = torch.arange(len(labels))
    alike = 0
    for label in labels.unique():
        members = rest = (labels == label).nonzero().flatten()
        while len(rest):
            first, fresh, rest = rest[0], rest[:1], rest[1:]
            while len(fresh):
                near = (patches[rest] @ patches[fresh[:CHUNK]].T > CORRELATION).any(1)
                fresh, rest = torch.cat([fresh[CHUNK:], rest[near]]), rest[~near]
                groups[fresh] = first
        if 2 * int(groups[members].bincount().max()) > len(members) > 2:
            groups[members] = members
            alike += 1
    if alike:
        console.stage("data", f"{name}: the images of {alike} classes are too alike to tell near-duplicates")
    return groups


def picture(images: DenseSet, i: int) -> Tensor:
    """Return the image of a sample, float32 (3, h, w) in [0, 1]."""
    return images.stored(i)["image"]


@dataclass(frozen=True)
class Duplicates:
    """The near-duplicates of a set: groups of images, the largest first. total: number of all images."""

    name: str
    total: int
    groups: list[list[tuple[DenseSet, int]]]

    @property
    def leaking(self) -> int:
        """The number of groups with images of several splits."""
        return sum(len({images.split for images, _ in group}) > 1 for group in self.groups)


def find_duplicates(name: str | Path) -> Duplicates:
    """Return the near-duplicates of the first copy of a set, across its splits. Raises UserError as `open_samples` does."""
    card = load_card(name)
    copy = first_copy(card, card.sources)
    sets = [open_samples(name, split) for split in (copy[0].splits if copy is not None else ["all"])]
    entries = [(images, i) for images in sets for i in range(len(images))]
    classes = [images.image_classes[images.labels[i]] if images.labels is not None else "" for images, i in entries]
    labels = torch.tensor(numbered(classes))
    found: dict[int, list[tuple[DenseSet, int]]] = {}
    for entry, group in zip(entries, near_duplicates(lambda i: picture(*entries[i]), labels, card.name).tolist()):
        found.setdefault(group, []).append(entry)
    groups = sorted((group for group in found.values() if len(group) > 1), key=len, reverse=True)
    return Duplicates(card.name, len(entries), groups)


def contact_sheet(groups: Sequence[Sequence[tuple[DenseSet, int]]]) -> bytes:
    """Return a PNG with a numbered row of images for each group."""
    sheet = Image.new("RGB", (MARGIN + TILE * max(map(len, groups)), TILE * len(groups)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, group in enumerate(groups):
        draw.text((4, TILE * row + TILE // 2 - 6), str(row + 1), "black")
        for column, entry in enumerate(group):
            tile = square(picture(*entry), TILE - 2).mul(255).round().to(torch.uint8)
            sheet.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (MARGIN + TILE * column, TILE * row))
    file = io.BytesIO()
    sheet.save(file, "png")
    return file.getvalue()
