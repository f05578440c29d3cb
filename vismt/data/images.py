"""The door to labelled images: `open_images` finds a card's copy and hands back an `ImageSet`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vismt import console
from vismt.data import arrays, embedded, folder, meta_dataset, torchvision_door
from vismt.data import csv_table as table
from vismt.data import id_lists as lists
from vismt.data import json_lists as filelist
from vismt.data.cards import Card, load_card
from vismt.data.source_types import (
    DENSE,
    TEXTS,
    ArraysSource,
    DigitsSource,
    FilelistSource,
    FolderSource,
    LabelListSource,
    MetaDatasetSource,
    PhotoCropsSource,
    Source,
    TableSource,
    TorchvisionSource,
)
from vismt.data.sources import Loaded, candidates, not_found, place, shown_path
from vismt.errors import UserError, near

DOORS = {True: "open_dense", False: "open_texts"}  # of sets that hold no labelled images, by Card.dense


@dataclass
class ImageSet:
    """Labelled images of one split.

    `labels` is int64 (n,) with values 0..len(classes)-1; `ids` are stable example names; `superclass` is int64
    (n_classes,) into `superclass_names`, or None; `skipped` names the examples left out because they cannot be decoded;
    `where` says where the copy lies; `nodes` lists the class ids below each node of a hierarchy, or None.
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

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> Tensor:
        """Image i as uint8 (3, h, w), native size. Raises UserError naming the file when it cannot be decoded."""
        return self.reader(i)

    def take(self, chosen: Sequence[int], skipped: Sequence[str] = ()) -> ImageSet:
        """The images `chosen`, ascending indices, as a set of their own with the same classes; skipped: ids to tell of."""
        kept = [int(i) for i in chosen]
        content = f"{hashlib.sha256(repr(kept).encode()).hexdigest()}:{list(skipped)}"
        return replace(
            self,
            labels=self.labels[kept],
            ids=[self.ids[i] for i in kept],
            reader=lambda i: self.reader(kept[i]),
            content=lambda: f"{self.content()}:{content}",
            skipped=list(skipped),
        )


def load_source(card: Card, source: Source, base: Path, split: str, download: bool = False) -> Loaded:
    """One split of the copy of `source` in the folder `base`, by the reader of its kind."""
    if isinstance(source, FolderSource):
        return folder.load(card, source, base, split)
    if isinstance(source, ArraysSource):
        return arrays.load(card, source, base, split)
    if isinstance(source, DigitsSource):
        return embedded.load_digits(card, source, base, split)
    if isinstance(source, PhotoCropsSource):
        return embedded.load_photo_crops(card, source, base, split)
    if isinstance(source, MetaDatasetSource):
        return meta_dataset.load(card, source, base, split)
    if isinstance(source, TableSource):
        return table.load(card, source, base, split)
    if isinstance(source, FilelistSource):
        return filelist.load(card, source, base, split)
    if isinstance(source, LabelListSource):
        return lists.load(card, source, base, split)
    if isinstance(source, TorchvisionSource):
        return torchvision_door.load(card, source, base, split, download)
    raise UserError(f"{card.shown}: is a dense set; open it with open_dense.")


def _readable_names(card: Card, classes: list[str]) -> list[str]:
    if card.names is None:
        return classes
    names = card.read_json(card.names)
    if isinstance(names, dict):
        return [str(names.get(name, name)) for name in classes]
    if not isinstance(names, list) or len(names) != len(classes):
        raise UserError(f"{card.shown}/{card.names}: must map class to name, or list {len(classes)} names.")
    return [str(name) for name in names]


def _superclasses(card: Card, loaded: Loaded) -> tuple[Tensor | None, list[str]]:
    classes = loaded.classes
    if card.superclasses is None and not loaded.above:
        return None, []
    above: dict[str, str]
    if card.superclasses is None:
        above = dict(zip(classes, loaded.above, strict=True))
    elif card.superclasses == "prefix":
        above = {name: name.rpartition("/")[0] for name in classes}
    else:
        above = card.read_json(card.superclasses)
    orphan = next((name for name in classes if not above.get(name)), None)
    if orphan is not None:
        raise UserError(f"{card.shown}: class '{orphan}' has no superclass in '{card.superclasses}'.")
    names = sorted({above[name] for name in classes})
    return torch.tensor([names.index(above[name]) for name in classes]), names


def _drop_damaged(images: ImageSet) -> ImageSet:
    """The set without the examples that cannot be decoded; a class that loses its last example is a UserError."""
    kept, skipped = [], []
    for i in console.track(range(len(images)), "data", f"{images.name}: decoding {len(images):,} images"):
        try:
            images.reader(i)
            kept.append(i)
        except UserError:
            skipped.append(images.ids[i])
    if not skipped:
        return images
    names = ", ".join(skipped[:5]) + (" ..." if len(skipped) > 5 else "")
    console.stage(
        "data", f"{images.name}: {len(skipped)} of {len(images):,} images skipped, they cannot be decoded: {names}"
    )
    labels = images.labels[kept]
    emptied = sorted(set(images.labels.tolist()) - set(labels.tolist()))
    if emptied:
        lost = images.classes[emptied[0]]
        raise UserError(
            f"data '{images.name}': no image of class '{lost}' can be decoded. Replace its files in {images.where}."
        )
    return images.take(kept, skipped)


def open_images(
    card: Card | str | Path,
    split: str = "all",
    *,
    root: Path | None = None,
    on_bad_sample: Literal["error", "skip"] = "error",
    download: bool = False,
) -> ImageSet:
    """The images of `split` ('all' = every split) from the first of the card's sources that is here and has that split.

    `root` names the folder of the set itself instead of searching VISMT_DATA and the cache. `download` lets torchvision
    fetch the set when no source is here. With `on_bad_sample='skip'` every image is decoded once now, and those that
    cannot be are left out, listed in `.skipped` and reported in a line; with 'error' reading one is a UserError.

    Raises UserError for an unknown card or split, a set that is not here, an empty class folder and a count of images
    or classes that differs from the card's.
    """
    card = card if isinstance(card, Card) else load_card(card)
    if on_bad_sample not in ("error", "skip"):
        raise UserError(f"on_bad_sample is '{on_bad_sample}'.{near(str(on_bad_sample), ['error', 'skip'])}")
    if card.dense or card.textual:
        raise UserError(
            f"{card.shown}: is a {'dense' if card.dense else 'text'} set; open it with {DOORS[card.dense]}."
        )
    if split != "all" and split not in card.splits:
        raise UserError(f"{card.shown}: no split '{split}'.{near(split, dict.fromkeys([*card.splits, 'all']))}")
    usable = [s for s in card.sources if not isinstance(s, (*DENSE, *TEXTS)) and (split == "all" or split in s.splits)]
    found = next(((s, base) for s in usable if (base := place(card, s, root)) is not None), None)
    if found is None and download:
        doors = [s for s in usable if isinstance(s, TorchvisionSource)]
        found = next(((s, candidates(card, s, root)[0]) for s in doors), None)
    if found is None:
        raise not_found(card, split, root)
    source, base = found
    loaded = load_source(card, source, base, split, download)
    superclass, names = _superclasses(card, loaded)
    images = ImageSet(
        card.name, split, _readable_names(card, loaded.classes), torch.tensor(loaded.labels, dtype=torch.int64), loaded.ids,
        loaded.read, loaded.content, superclass, names, where=shown_path(base), nodes=loaded.nodes or None,
    )  # fmt: skip
    return images if on_bad_sample == "error" else _drop_damaged(images)
