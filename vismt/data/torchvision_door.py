"""torchvision's own data classes as one kind of source: how each names its splits, its labels and its classes."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vismt.data.cards import Card
from vismt.data.decode import DAMAGED, to_rgb
from vismt.data.source_types import TorchvisionSource
from vismt.data.sources import Loaded, fix, shown_path, verify_classes, verify_counts
from vismt.errors import UserError, near

REFUSED = (RuntimeError, OSError, ValueError, ImportError, EOFError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Door:
    """`splits`: our name -> constructor arguments. `labels`, `classes`: the attribute that holds them.

    Labels may be stored as (something, label) pairs; classes may be given as a tuple where the class stores none.
    """

    splits: dict[str, dict[str, Any]]
    labels: str | Callable[[Any], list[int]] = "targets"
    classes: str | tuple[str, ...] = "classes"


def _named(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


def _pcam_labels(dataset: Any) -> list[int]:
    """PCAM keeps labels (n, 1, 1, 1) in an HDF5 file that indexing would reopen for each example."""
    with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
        return [int(label) for label in file["y"][:, 0, 0, 0]]


TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
DIGITS = tuple("0123456789")
DOORS: dict[str, Door] = {
    "CIFAR10": Door(TRAIN_FLAG),
    "CIFAR100": Door(TRAIN_FLAG),
    "Caltech101": Door({"all": {}}, "y", "categories"),
    "Country211": Door(_named("train", "valid", "test")),
    "DTD": Door(_named("train", "val", "test"), "_labels"),
    "EuroSAT": Door({"all": {}}),
    "FGVCAircraft": Door(_named("train", "val", "test"), "_labels"),
    "FashionMNIST": Door(TRAIN_FLAG),
    "Flowers102": Door(_named("train", "val", "test"), "_labels"),
    "Food101": Door(_named("train", "test"), "_labels"),
    "GTSRB": Door(_named("train", "test"), "_samples", tuple(f"{k:02d}" for k in range(43))),
    "KMNIST": Door(TRAIN_FLAG),
    "MNIST": Door(TRAIN_FLAG),
    "Omniglot": Door(
        {"background": {"background": True}, "evaluation": {"background": False}},
        "_flat_character_images", "_characters",
    ),
    "OxfordIIITPet": Door(_named("trainval", "test"), "_labels"),
    "PCAM": Door(_named("train", "val", "test"), _pcam_labels, ("no_tumour", "tumour")),
    "STL10": Door(_named("train", "test"), "labels"),
    "SUN397": Door({"all": {}}, "_labels"),
    "SVHN": Door(_named("train", "test"), "labels", DIGITS),
    "StanfordCars": Door(_named("train", "test"), "_samples"),
}  # fmt: skip


def _construct(card: Card, source: TorchvisionSource, base: Path, split: str, download: bool) -> Any:
    import torchvision

    door = DOORS[source.dataset]
    try:
        return getattr(torchvision.datasets, source.dataset)(str(base), download=download, **door.splits[split])
    except REFUSED as error:
        reason = " ".join(str(error).split())
        act = "could not download" if download else "could not open"
        raise UserError(
            f"{card.shown}: torchvision {act} {source.dataset} (split '{split}') under {shown_path(base)}: {reason}. {fix(card)}"
        ) from error


def _labels(dataset: Any, door: Door) -> list[int]:
    stored = door.labels(dataset) if callable(door.labels) else getattr(dataset, door.labels)
    return [int(item[1] if isinstance(item, (tuple, list)) else item) for item in stored]


def door_of(card: Card, source: TorchvisionSource) -> Door:
    """The table's entry for the source; UserError for a class or a split that it does not know."""
    door = DOORS.get(source.dataset)
    if door is None:
        raise UserError(
            f"{card.shown}: torchvision class '{source.dataset}' is not known.{near(source.dataset, DOORS)}"
        )
    strange = next((split for split in source.splits if split not in door.splits), None)
    if strange is not None:
        raise UserError(f"{card.shown}: {source.dataset} has no split '{strange}'.{near(strange, door.splits)}")
    return door


def load(card: Card, source: TorchvisionSource, base: Path, split: str, download: bool = False) -> Loaded:
    """The images of `split` through torchvision; ids are `<split>/<row>`.

    Classes of several splits are united by name (Omniglot's splits have different ones). Raises UserError when
    torchvision cannot open or download the set, or an image of it cannot be decoded.
    """
    door = door_of(card, source)
    wanted = list(source.splits) if split == "all" else [split]
    if download:
        base.mkdir(parents=True, exist_ok=True)
    parts = {name: _construct(card, source, base, name, download) for name in wanted}
    index: dict[str, int] = {}
    labels: list[int] = []
    counts: dict[str, int] = {}
    for name, dataset in parts.items():
        names = [str(c) for c in (getattr(dataset, door.classes) if isinstance(door.classes, str) else door.classes)]
        own = _labels(dataset, door)
        for title in names:
            index.setdefault(title, len(index))
        labels += [index[names[label]] for label in own]
        counts[name] = len(own)
    verify_counts(card, source, base, counts, {})
    if split == "all" or len(index) > (source.classes or card.classes):
        verify_classes(card, source, base, len(index))
    rows = [(name, row) for name in wanted for row in range(counts[name])]

    def read(i: int) -> Tensor:
        name, row = rows[i]
        try:
            return to_rgb(parts[name][row][0])
        except DAMAGED as error:
            where = f"{source.dataset} {name}/{row:06d} under {shown_path(base)}"
            raise UserError(f"{where}: cannot be decoded ({error}). {fix(card)}") from error

    stamp = f"torchvision:{source.dataset}:{counts}:{labels}"
    ids = [f"{name}/{row:06d}" for name, row in rows]
    return Loaded(list(index), labels, ids, read, lambda: hashlib.sha256(stamp.encode()).hexdigest())
