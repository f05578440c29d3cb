"""Labelled images: the set that `open_images` returns, and the sources that load it.

A format of images says where the images are. It is a subclass of ImageSource whose `list_images` returns a name and a class for
each image of a copy. What every format needs is written once, here: ids and labels, the check of numbers of images and classes
against the card, missing files, decoding, readable names, superclasses, and a text that tells this content from any other.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.copies import digest_files, shown_path, verify_classes, verify_counts, verify_present
from vismt.data.decode import decode_file
from vismt.data.source_types import NEAR_DUPLICATES, NONE, Card, DataSource, check_names

DECODED = 20_000  # number of images of a set that are decoded for near-duplicates if the card does not ask for it


@dataclass
class ImageSet:
    """Labelled images of one split.

    Attributes:
        labels: Labels int64 (n,) with values 0..len(classes)-1.
        ids: Name of each image, stable between runs.
        read: Function from i to image i as uint8 (3, h, w), native size. It raises UserError, with the file, for an image that
            cannot be decoded.
        content: Text that differs for any other content.
        superclass: Numbers int64 (n_classes,) into `superclass_names`, or None.
        skipped: Ids of the images that are left out because they cannot be decoded.
        where: Folder of the copy, as messages name it.
        nodes: Class ids below each node of a hierarchy, or None.
        groups: Group of each image by its id, which a division keeps in one part. Images without an entry are alone. None means
            that near-duplicates have to be found.
        group_unit: Name of a group, in the plural.
        file: Function from i to the file that holds image i alone, or to None.
        cached: Whether `content` tells these images from all others, so that decoded images may be kept for later runs.
        timed: Whether `content` depends on the times of files, which a copy of the same images does not have.
    """

    name: str
    split: str
    classes: list[str]
    labels: Tensor
    ids: list[str]
    read: Callable[[int], Tensor]
    content: Callable[[], str]
    superclass: Tensor | None = None
    superclass_names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    where: str = ""
    nodes: list[list[int]] | None = None
    groups: Mapping[str, Hashable] | None = field(default_factory=dict)
    group_unit: str = "groups"
    file: Callable[[int], Path | None] = lambda i: None
    cached: bool = True
    timed: bool = False

    def __post_init__(self) -> None:
        check_names((*self.classes, *self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Sequence[int], skipped: Sequence[str] = ()) -> ImageSet:
        """Return a set of the images with the ascending indices `chosen` and the same classes.

        skipped: Ids to report.
        """
        indices = [int(i) for i in chosen]
        content = f"{hashlib.sha256(repr(indices).encode()).hexdigest()}:{list(skipped)}"
        return replace(
            self,
            labels=self.labels[indices],
            ids=[self.ids[i] for i in indices],
            read=lambda i: self.read(indices[i]),
            file=lambda i: self.file(indices[i]),
            content=lambda: f"{self.content()}:{content}",
            skipped=list(skipped),
        )


def named_groups(
    names: Sequence[str], entries: Sequence[tuple[Any, int]], alone: Sequence[str] = ()
) -> tuple[dict[str, str], str]:
    """Return the group of each image by its name, and what the groups are, in the plural. Return {} and "" if all are alone.

    names: Names of the images. entries: Set and number of each image. Near-duplicates are found in the sets. alone: Group of an
    image without a near-duplicate, by default its name.
    """
    groups, units = {}, set()
    for name, single, (images, i) in zip(names, alone or names, entries, strict=True):
        own = (images.groups or {}).get(images.ids[i])
        groups[name] = single if own is None else f"{images.name} {own}"
        if own is not None:
            units.add(images.group_unit)
    if len(set(groups.values())) == len(groups):
        return {}, ""
    return groups, units.pop() if len(units) == 1 else "groups" if units else "images"


class ImageRow(NamedTuple):
    """One image of a copy.

    Attributes:
        name: Name, stable between runs. For an image file it is the path in the folder of the copy.
        label: Number of its class.
        image: Argument for the `read` of the listing. None for the file `name`, which must then exist.
    """

    name: str
    label: int
    image: Any = None


@dataclass
class Listing:
    """The images of some splits of a copy.

    Attributes:
        classes: Names of the classes, as the copy has them.
        rows: Images of each split, in order.
        read: Function that returns the image of a row as uint8 (3, h, w). The default decodes its file.
        content: Text that differs for any other content. The default is a hash of the files and the labels.
        counted: Number of classes to compare with the card's number. The default is the number of `classes`.
        files: Number of files in each group of the manifest, which the error for a short copy names.
        above: Superclass of each class. Empty if the copy does not say.
        nodes: Class ids below each node of a hierarchy. Empty if the copy does not say.
        timed: Whether `content` depends on times of files, see ImageSet.
    """

    classes: list[str]
    rows: dict[str, list[ImageRow]]
    read: Callable[[Any], Tensor] = decode_file
    content: Callable[[], str] | None = None
    counted: int | None = None
    files: dict[str, int] = field(default_factory=dict)
    above: list[str] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)
    timed: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageSource(DataSource):
    """A source of labelled images."""

    family: ClassVar[str] = "labelled images"
    opener: ClassVar[str] = "open_images"

    @abstractmethod
    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images of `splits` of the copy in the folder `base`. A label means the same in each split."""

    def load(self, card: Card, base: Path, split: str) -> ImageSet:
        """Return `split` of the copy in the folder `base`, checked against the card."""
        found = self.list_images(card, base, self.wanted(split))
        verify_counts(card, self, base, {name: len(rows) for name, rows in found.rows.items()}, found.files)
        verify_classes(card, self, base, len(found.classes) if found.counted is None else found.counted)
        images = []
        for name, rows in found.rows.items():
            verify_present(card, base, [row.name for row in rows if row.image is None], name)
            images += [base / row.name if row.image is None else row.image for row in rows]
        ids = [row.name for rows in found.rows.values() for row in rows]
        labels = [row.label for rows in found.rows.values() for row in rows]
        superclass, superclass_names = _superclasses(card, found)
        read = found.read
        return ImageSet(
            name=card.name,
            split=split,
            classes=readable_names(card, found.classes),
            labels=torch.tensor(labels, dtype=torch.int64),
            ids=ids,
            read=lambda i: read(images[i]),
            file=lambda i: images[i] if isinstance(images[i], Path) else None,
            content=cache(found.content or (lambda: f"{digest_files(zip(ids, images)).sha256}:{labels}")),
            superclass=superclass,
            superclass_names=superclass_names,
            where=shown_path(base),
            nodes=found.nodes or None,
            timed=found.timed,
            groups=card.read_groups(NEAR_DUPLICATES if len(ids) <= DECODED else NONE, ids),
            group_unit=card.group_unit,
        )


def readable_names(card: Card, classes: list[str]) -> list[str]:
    """Return the names that the card has for the classes. The default is the given names."""
    names = card.read_names()
    if names is None:
        return classes
    if isinstance(names, dict):
        return [str(names.get(name, name)) for name in classes]
    if not isinstance(names, list) or len(names) != len(classes):
        where = f"{card.shown}/{card.names}" if isinstance(card.names, str) else f"{card.shown}: names"
        raise UserError(f"{where}: must map class to name, or list {len(classes)} names.")
    return [str(name) for name in names]


def _superclasses(card: Card, found: Listing) -> tuple[Tensor | None, list[str]]:
    """Return the superclass of each class, int64 (n_classes,), and the names of the superclasses."""
    superclass_of: dict[str, str]
    if card.superclasses == "prefix":
        superclass_of = {name: name.rpartition("/")[0] for name in found.classes}
    elif card.superclasses is not None:
        superclass_of = card.read_mapping(card.superclasses, "class to superclass", str)
    elif found.above:
        superclass_of = dict(zip(found.classes, found.above, strict=True))
    else:
        return None, []
    orphan = next((name for name in found.classes if not superclass_of.get(name)), None)
    if orphan is not None:
        raise UserError(f"{card.shown}: class '{orphan}' has no superclass in '{card.superclasses}'.")
    places = {name: place for place, name in enumerate(sorted({superclass_of[name] for name in found.classes}))}
    return torch.tensor([places[superclass_of[name]] for name in found.classes]), list(places)
