"""Labelled images: `open_images` finds a copy of a set on this machine and returns an `ImageSet`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError, near
from vismt.data.cards import Card, load_card
from vismt.data.copies import first_copy, listed, not_found, shown_path, sources_for
from vismt.data.fetching import fetch
from vismt.data.formats.python_sets import images_of, python_object
from vismt.data.image_source import ImageSource, LoadedImages
from vismt.data.set_entries import row_name
from vismt.data.source_types import NEAR_DUPLICATES, NONE

DECODED = 20_000  # images of a set that are decoded for near-duplicates where the card does not ask for it


@dataclass
class ImageSet:
    """Labelled images of one split.

    Attributes:
        labels: int64 (n,) with values 0..len(classes)-1.
        ids: name of each image, stable between runs.
        reader: image i as uint8 (3, h, w), native size.
        content: a text that differs for any other content.
        superclass: int64 (n_classes,) into `superclass_names`, or None.
        skipped: ids of the images left out because they cannot be decoded.
        where: the folder of the copy, as messages name it.
        nodes: class ids below each node of a hierarchy, or None.
        groups: the group of each image by its id, which a division keeps in one part; images without an entry are alone. None:
            near-duplicates are to be found.
        cached: whether `content` tells these images from all others, so that decoded ones may be kept for later runs.
    """

    name: str
    split: str
    classes: list[str]
    labels: Tensor
    ids: list[str]
    reader: Callable[[int], Tensor]
    content: Callable[[], str]
    superclass: Tensor | None = None
    superclass_names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    where: str = ""
    nodes: list[list[int]] | None = None
    groups: Mapping[str, Any] | None = field(default_factory=dict)
    cached: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> Tensor:
        """Return image i as uint8 (3, h, w), native size. Raises UserError, with the file, when it cannot be decoded."""
        return self.reader(i)

    def take(self, chosen: Sequence[int], skipped: Sequence[str] = ()) -> ImageSet:
        """Return a set of the images with the ascending indices `chosen` and the same classes; skipped: ids to report."""
        indices = [int(i) for i in chosen]
        content = f"{hashlib.sha256(repr(indices).encode()).hexdigest()}:{list(skipped)}"
        return replace(
            self,
            labels=self.labels[indices],
            ids=[self.ids[i] for i in indices],
            reader=lambda i: self.reader(indices[i]),
            content=lambda: f"{self.content()}:{content}",
            skipped=list(skipped),
        )


def _readable_names(card: Card, classes: list[str]) -> list[str]:
    if card.names is None:
        return classes
    names = card.read_json(card.names)
    if isinstance(names, dict):
        return [str(names.get(name, name)) for name in classes]
    if not isinstance(names, list) or len(names) != len(classes):
        raise UserError(f"{card.shown}/{card.names}: must map class to name, or list {len(classes)} names.")
    return [str(name) for name in names]


def _superclasses(card: Card, loaded: LoadedImages) -> tuple[Tensor | None, list[str]]:
    """Return the superclass of each class, int64 (n_classes,), and the names of the superclasses."""
    classes = loaded.classes
    superclass_of: dict[str, str]
    if card.superclasses == "prefix":
        superclass_of = {name: name.rpartition("/")[0] for name in classes}
    elif card.superclasses is not None:
        superclass_of = card.read_json(card.superclasses)
    elif loaded.above:
        superclass_of = dict(zip(classes, loaded.above, strict=True))
    else:
        return None, []
    orphan = next((name for name in classes if not superclass_of.get(name)), None)
    if orphan is not None:
        raise UserError(f"{card.shown}: class '{orphan}' has no superclass in '{card.superclasses}'.")
    places = {name: place for place, name in enumerate(sorted({superclass_of[name] for name in classes}))}
    return torch.tensor([places[superclass_of[name]] for name in classes]), list(places)


def _drop_damaged(images: ImageSet) -> ImageSet:
    """Return the set without the examples that cannot be decoded; a class that loses its last example is a UserError."""
    kept, skipped = [], []
    for i in console.track(range(len(images)), "data", f"{images.name}: decoding {len(images):,} images"):
        try:
            images.reader(i)
            kept.append(i)
        except UserError:
            skipped.append(images.ids[i])
    if not skipped:
        return images
    share = f"{len(skipped)} of {len(images):,} images"
    console.stage("data", f"{images.name}: {share} skipped, they cannot be decoded: {listed(skipped, 5)}")
    emptied = sorted(set(images.labels.tolist()) - set(images.labels[kept].tolist()))
    if emptied:
        name = images.classes[emptied[0]]
        raise UserError(
            f"data '{images.name}': no image of class '{name}' can be decoded. Replace its files in {images.where}."
        )
    return images.take(kept, skipped)


def _from_object(given: Any, title: str, split: str) -> ImageSet:
    """Return a data set given in Python."""
    if isinstance(given, ImageSet):
        return given
    loaded = images_of(given, title)
    labels = torch.tensor(loaded.labels, dtype=torch.int64)
    return ImageSet(
        title, split, loaded.classes, labels, loaded.ids, loaded.read, loaded.content, where=title, cached=False
    )


def open_images(
    card: Card | str | Path,
    split: str = "all",
    *,
    root: Path | None = None,
    on_bad_sample: Literal["error", "skip"] = "error",
    download: bool = False,
) -> ImageSet:
    """Return the images of `split`, from the first of the card's sources that is on this machine and has that split.

    Args:
        card: a card, its name, its file or its folder; a folder of class folders or a csv file without a card; the name of a
            Python object (python_sets.py).
        split: name of a split, or "all" for every split.
        root: folder of the set itself, instead of a search in VISMT_DATA and the cache.
        on_bad_sample: with "skip" every image is decoded once now, and those that cannot be decoded are left out, listed in
            `.skipped` and reported in a line; with "error" reading one raises UserError.
        download: let torchvision download the set when no source is on this machine.

    Raises:
        UserError: an unknown card or split, a set that is not on this machine, an empty class folder, and another number of
            images or classes than the card says.
    """
    if on_bad_sample not in ("error", "skip"):
        raise UserError(f"on_bad_sample is '{on_bad_sample}'.{near(str(on_bad_sample), ['error', 'skip'])}")
    given = None if isinstance(card, Card) else python_object(str(card), split)
    if given is not None:
        images = _from_object(given, row_name(str(card)), split)
        return images if on_bad_sample == "error" else _drop_damaged(images)
    card = card if isinstance(card, Card) else load_card(card)
    sources = sources_for(card, ImageSource, split)
    copy = first_copy(card, sources, root)
    if copy is None:
        downloadable = next((source for source in sources if source.downloadable), None) if download else None
        if downloadable is None:
            raise not_found(card, split, root)
        copy = downloadable, downloadable.candidates(card, root)[-1]
        fetch(card, *copy, lambda: first_copy(card, sources, root) is not None)
    source, base = copy
    loaded = source.load(card, base, split)
    superclass, superclass_names = _superclasses(card, loaded)
    images = ImageSet(
        name=card.name,
        split=split,
        classes=_readable_names(card, loaded.classes),
        labels=torch.tensor(loaded.labels, dtype=torch.int64),
        ids=loaded.ids,
        reader=loaded.read,
        content=cache(loaded.content),
        superclass=superclass,
        superclass_names=superclass_names,
        where=shown_path(base),
        nodes=loaded.nodes or None,
        groups=card.read_groups(NEAR_DUPLICATES if len(loaded.ids) <= DECODED else NONE),
    )
    return images if on_bad_sample == "error" else _drop_damaged(images)
