"""Images with per-pixel maps: finds a card's copy, reads its samples and derives the targets that the card declares.

A set of image classification is one, too, whose samples hold the image and its class (`classified`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vismt.data import stereo
from vismt.data.cards import Card, load_card
from vismt.data.dense_files import pairs
from vismt.data.dense_maps import read_maps
from vismt.data.dense_sample import CLASS, MAPS, Sample
from vismt.data.derived import edges_from_depth, edges_from_labels, normals_from_depth
from vismt.data.images import ImageSet, open_images
from vismt.data.pascal_context import PARTS
from vismt.data.source_types import DENSE, DENSE_MAPS, DenseSource
from vismt.data.sources import not_found, place, shown_path, verify_counts
from vismt.errors import UserError, near


@dataclass(frozen=True)
class DenseSet:
    """Split of a dense set. `read(i)` gives the sample of image i (dense_sample.py).

    `targets` are those that its samples may have; `classes` names the values of semseg, `parts` those of parts,
    `image_classes` those of class, and `labels` (int64, n) holds the class of every image, None where they have none.
    With `inverse_depth` the depth target holds multiples of 1/depth. `where` says where the copy lies. `edges` is the target
    that edges are derived from, "semseg" or "depth"; `stored(i)` lacks them, and None says that it has all there is.
    """

    name: str
    split: str
    classes: list[str]
    targets: list[str]
    ids: list[str]
    stored: Callable[[int], Sample]
    parts: list[str] = field(default_factory=list)
    inverse_depth: bool = False
    where: str = ""
    image_classes: list[str] = field(default_factory=list)
    labels: Tensor | None = None
    edges: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int, change: Callable[[Sample], Sample] | None = None) -> Sample:
        """The sample of image i in its own size, or what `change` makes of it.

        Edges are derived from the changed map: resized ones would have gaps and lines of two pixels.
        """
        sample = self.stored(i) if change is None else change(self.stored(i))
        if self.edges not in sample:
            return sample
        derive = edges_from_labels if self.edges == "semseg" else edges_from_depth
        return {**sample, "edge": derive(sample[self.edges])}


def _with_normals(source: DenseSource, sample: Sample) -> Sample:
    if "normals" in source.derive and "depth" in sample:
        sample["normals"] = normals_from_depth(sample["depth"], **source.camera)
    return sample


def _open(card: Card, source: DenseSource, base: Path, split: str) -> DenseSet:
    parts = {name: pairs(card, source, base, name) for name in (source.splits if split == "all" else [split])}
    verify_counts(card, source, base, {name: len(found) for name, found in parts.items()}, {})
    paths = [pair for found in parts.values() for pair in found]
    if not paths:
        raise UserError(f"{card.shown}: no image of split '{split}' found under {shown_path(base)}.")
    count = source.classes or card.classes
    names = card.read_json(card.names) if card.names else [str(k) for k in range(count)]
    if len(names) != count:
        raise UserError(f"{card.shown}/{card.names}: names {len(names)} classes, the card says {count}.")
    known_normals = card.read_json(source.normal_classes) if source.normal_classes else {}
    there = {DENSE_MAPS[name] for pair in paths for name in pair if name != "image"}
    there |= {target for target, origin in source.derive.items() if origin in there}
    return DenseSet(
        card.name, split, [str(name) for name in names], [target for target in MAPS if target in there],
        [pair["image"].relative_to(base).as_posix() for pair in paths],
        lambda i: _with_normals(source, read_maps(paths[i], source, count, known_normals)),
        list(PARTS) if "parts" in there else [], "inverse_depth" in source.maps, shown_path(base),
        edges=source.derive.get("edge"),
    )  # fmt: skip


def open_dense(card: Card | str | Path, split: str = "all", *, root: Path | None = None) -> DenseSet:
    """The samples of `split` ('all' = every split); ids are the image's path inside the set.

    Raises UserError when the set, a split, one map of an image or, unless the card says null, a number of images is missing,
    and later, naming the file, on a damaged file, a map of another size and values that the map cannot hold.
    """
    card = card if isinstance(card, Card) else load_card(card)
    sources = [source for source in card.sources if isinstance(source, DENSE)]
    if not sources:
        raise UserError(
            f"{card.shown}: is a set of {card.sources[0].kind} images without maps; open it with open_images."
        )
    if split != "all" and split not in card.splits:
        raise UserError(f"{card.shown}: no split '{split}'.{near(split, [*card.splits, 'all'])}")
    for source in sources:
        base = place(card, source, root)
        if base is None or (split != "all" and split not in source.splits):
            continue
        if isinstance(source, DenseSource):
            return _open(card, source, base, split)
        ids, stored = stereo.load(card, source, base, split)
        return DenseSet(card.name, split, [], list(stereo.TARGETS), ids, stored, where=shown_path(base), edges="depth")
    raise not_found(card, split, root)


def classified(images: ImageSet) -> DenseSet:
    """A set of image classification as samples of an image, in its own size, and its class."""

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
    )


def open_samples(card: str | Path, split: str = "all") -> DenseSet:
    """The samples of any card, of maps or of classified images; errors of open_dense and open_images."""
    found = load_card(card)
    dense = any(isinstance(source, DENSE) for source in found.sources)
    return open_dense(found, split) if dense else classified(open_images(found, split))
