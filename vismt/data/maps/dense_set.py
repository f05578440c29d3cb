"""Images with per-pixel maps: the set that `open_dense` returns, the sources that load it, and checks that several share.

A set of image classification can also be opened as one. Its samples hold the image and its class (`classified`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.cards import Card, load_card
from vismt.data.copies import found_copy
from vismt.data.image_set import DECODED
from vismt.data.images import ImageSet, open_images
from vismt.data.maps.dense_sample import CLASS, Sample
from vismt.data.maps.derived_maps import edges_from_depth, edges_from_labels
from vismt.data.source_types import NONE, DataSource, check_names

CAMERA = ("fx", "fy", "cx", "cy")


@dataclass(frozen=True)
class DenseSet:
    """One split of a dense set. `read(i)` gives the sample of image i, see dense_sample.py.

    Attributes:
        classes: Names of the values of semseg.
        targets: Names of the targets that the samples may have.
        ids: Name of each image.
        stored: Function from i to the sample of image i without the derived edges.
        parts: Names of the values of parts.
        inverse_depth: Whether the depth target holds multiples of 1/depth.
        where: Folder of the copy, as messages name it.
        image_classes: Names of the values of class.
        labels: Class int64 (n,) of every image. None if images have no class.
        content: Function from i to a text that differs for any other content of the files of image i, or for another set. "" if
            that is not known.
        edges: Target that edges are derived from, "semseg" or "depth". None if `stored` has all targets.
        groups, group_unit, file: As in ImageSet.
    """

    name: str
    split: str
    classes: list[str]
    targets: list[str]
    ids: list[str]
    stored: Callable[[int], Sample]
    content: Callable[[int], str] = lambda i: ""
    parts: list[str] = field(default_factory=list)
    inverse_depth: bool = False
    where: str = ""
    image_classes: list[str] = field(default_factory=list)
    labels: Tensor | None = None
    edges: str | None = None
    groups: Mapping[str, Hashable] | None = field(default_factory=dict)
    group_unit: str = "groups"
    file: Callable[[int], Path | None] = lambda i: None

    def __post_init__(self) -> None:
        check_names(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int, change: Callable[[Sample], Sample] | None = None) -> Sample:
        """Return the sample of image i in its own size, or `change` of it.

        Edges are derived from the changed map, because resized edges would have gaps and lines of two pixels.
        """
        sample = self.stored(i) if change is None else change(self.stored(i))
        if self.edges is None or self.edges not in sample:
            return sample
        derive = edges_from_labels if self.edges == "semseg" else edges_from_depth
        return {**sample, "edge": derive(sample[self.edges])}


@dataclass(frozen=True, kw_only=True)
class DenseSource(DataSource):
    """A source of images with per-pixel maps."""

    family: ClassVar[str] = "images with maps"
    opener: ClassVar[str] = "open_dense"

    @abstractmethod
    def load(self, card: Card, base: Path, split: str) -> DenseSet:
        """Return `split` of the copy in the folder `base`."""

    @property
    def inverse_depth(self) -> bool:
        """Whether the depth target holds multiples of 1/depth."""
        return False


def check_camera(camera: Mapping[str, float], where: str) -> None:
    """Raise UserError unless `camera` has fx, fy, cx, cy with focal lengths above 0."""
    if set(camera) != set(CAMERA) or min(camera["fx"], camera["fy"]) <= 0:
        raise UserError(f"{where}: camera {camera} must give {', '.join(CAMERA)} in pixels, fx and fy above 0.")


def open_dense(card: Card | str | Path, split: str = "all") -> DenseSet:
    """Return the samples of `split`, from the first of the card's sources that is on this machine.

    Args:
        card: Card, its name, its file or its folder.
        split: Name of a split, or "all" for every split.

    Raises:
        UserError: If a set, a split or a map of an image is missing, or the number of images differs from the card. Reading a
            sample raises it for a damaged file, a map of another size, and values that the map cannot hold. The error names the
            file.
    """
    card = card if isinstance(card, Card) else load_card(card)
    source, base = found_copy(card, DenseSource, split)
    opened = source.load(card, base, split)
    return replace(opened, groups=card.read_groups(NONE, opened.ids), group_unit=card.group_unit)


def classified(images: ImageSet, key: str = CLASS) -> DenseSet:
    """Return a set of image classification as samples of an image, in its own size, and its class, named `key`."""

    def stored(i: int) -> Sample:
        return {"image": images.read(i).to(torch.float32) / 255, key: images.labels[i]}

    return DenseSet(
        images.name,
        images.split,
        [],
        [key],
        images.ids,
        stored,
        lambda i: images.content() if images.cached and not images.timed and len(images) <= DECODED else "",
        where=images.where,
        image_classes=images.classes,
        labels=images.labels,
        groups=images.groups,
        group_unit=images.group_unit,
        file=images.file,
    )


def open_samples(card: str | Path, split: str = "all", key: str = CLASS) -> DenseSet:
    """Return the samples of any card of maps or of classified images. The class of classified images is named `key`."""
    loaded = load_card(card)
    return open_dense(loaded, split) if loaded.sources_of(DenseSource) else classified(open_images(loaded, split), key)
