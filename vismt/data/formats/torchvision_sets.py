"""The data classes of torchvision as one kind of source: how each class names its splits, its labels and its classes."""

from __future__ import annotations

import hashlib
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.base.seeds import digest
from vismt.config.typed import Names, RelativePath
from vismt.data.copies import fix, shown_path
from vismt.data.decode import decoding, to_rgb
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import Card, source_kind
from vismt.storage.paths import cache_root

_REFUSED = (RuntimeError, OSError, ValueError, ImportError, EOFError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class DatasetLayout:
    """How a class of torchvision is used.

    Attributes:
        splits: Constructor arguments by the name of a split in cards.
        labels: Attribute of the labels, which may be (something, label) pairs, or a function of the data set.
        classes: Attribute of the names of the classes, or the names, if the class does not store them.
    """

    splits: Mapping[str, Mapping[str, object]]
    labels: str | Callable[[Any], list[int]] = "targets"
    classes: str | tuple[str, ...] = "classes"


def _named(*names: str) -> dict[str, dict[str, object]]:
    return {name: {"split": name} for name in names}


def _pcam_labels(dataset: Any) -> list[int]:
    """Return the labels of PCAM, (n, 1, 1, 1). They are in an HDF5 file that indexing would reopen for each example."""
    with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
        return [int(label) for label in file["y"][:, 0, 0, 0]]


TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
_DIGITS = tuple("0123456789")
MEMBER_DIGITS = 12  # of the digest of an image: a false match among 60,000 images has a probability of 2e-6
# classes whose pixels are the array `data`
_ARRAYS = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "SVHN")
LAYOUTS: dict[str, DatasetLayout] = {
    "CIFAR10": DatasetLayout(TRAIN_FLAG),
    "CIFAR100": DatasetLayout(TRAIN_FLAG),
    "Caltech101": DatasetLayout({"all": {}}, "y", "categories"),
    "Country211": DatasetLayout(_named("train", "valid", "test")),
    "DTD": DatasetLayout(_named("train", "val", "test"), "_labels"),
    "EuroSAT": DatasetLayout({"all": {}}),
    "FGVCAircraft": DatasetLayout(_named("train", "val", "test"), "_labels"),
    "FashionMNIST": DatasetLayout(TRAIN_FLAG),
    "Flowers102": DatasetLayout(_named("train", "val", "test"), "_labels"),
    "Food101": DatasetLayout(_named("train", "test"), "_labels"),
    "GTSRB": DatasetLayout(_named("train", "test"), "_samples", tuple(f"{k:02d}" for k in range(43))),
    "KMNIST": DatasetLayout(TRAIN_FLAG),
    "MNIST": DatasetLayout(TRAIN_FLAG),
    "Omniglot": DatasetLayout(
        {"background": {"background": True}, "evaluation": {"background": False}},
        "_flat_character_images", "_characters",
    ),
    "OxfordIIITPet": DatasetLayout(_named("trainval", "test"), "_labels"),
    "PCAM": DatasetLayout(_named("train", "val", "test"), _pcam_labels, ("no_tumour", "tumour")),
    "STL10": DatasetLayout(_named("train", "test"), "labels"),
    "SUN397": DatasetLayout({"all": {}}, "_labels"),
    "SVHN": DatasetLayout(_named("train", "test"), "labels", _DIGITS),
    "StanfordCars": DatasetLayout(_named("train", "test"), "_samples"),
}  # fmt: skip


@source_kind("torchvision")
@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(ImageSource):
    """A class of torchvision.datasets, found in or downloaded to the cache folder.

    Attributes:
        dataset: Name of the class.
        root: Folder below the cache.
        downloads: Whether torchvision can still download the set.
        members: JSON file beside the card, for a part of the set: {split: {name of an image: digest of its pixels}}.
    """

    dataset: Annotated[str, Names(LAYOUTS, only=True)]
    root: RelativePath
    downloads: bool = True
    members: RelativePath | None = None

    def check(self, where: str) -> None:
        super().check(where)
        if self.members is None:
            require_known(f"{where}: {self.dataset} has no split", self.splits, LAYOUTS[self.dataset].splits)
        else:
            require_known(f"{where}: 'members' is for sets that are arrays; no", [self.dataset], _ARRAYS)

    def candidates(self, card: Card) -> list[Path]:
        return [cache_root() / "torchvision" / self.root]

    @property
    def downloadable(self) -> bool:
        return self.downloads

    def download(self, card: Card, base: Path) -> None:
        for split in self._published(list(self.splits)):
            self._construct(card, base, split, download=True)

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images through torchvision. Ids are `<split>/<row>`, or the ids of the members.

        Classes of several splits are united by name (Omniglot's splits have different classes).
        """
        layout = LAYOUTS[self.dataset]
        parts = {split: self._construct(card, base, split) for split in self._published(splits)}
        number: dict[str, int] = {}
        rows: dict[str, list[ImageRow]] = {}
        for split, dataset in parts.items():
            classes = getattr(dataset, layout.classes) if isinstance(layout.classes, str) else layout.classes
            names = [str(name) for name in classes]
            for name in names:
                number.setdefault(name, len(number))
            rows[split] = [
                ImageRow(f"{split}/{row:06d}", number[names[label]], (split, row))
                for row, label in enumerate(_labels(dataset, layout))
            ]
        if self.members is not None:
            rows = self._members(card, base, parts, rows, splits)
        labels = [row.label for part in rows.values() for row in part]
        counts = {split: len(part) for split, part in rows.items()}
        stamp = f"torchvision:{self.dataset}:{counts}:{labels}"
        if self.members is not None:
            stamp += f":{[row.image for part in rows.values() for row in part]}"
        expected = self.classes or card.classes

        def read(place: tuple[str, int]) -> Tensor:
            split, row = place
            with decoding(f"{self.dataset} {split}/{row:06d} under {shown_path(base)}", fix(card)), _NoPrograms.used():
                return to_rgb(parts[split][row][0])

        return Listing(
            classes=list(number),
            rows=rows,
            read=read,
            content=lambda: hashlib.sha256(stamp.encode()).hexdigest(),
            # One of several splits may lack classes.
            counted=max(len(number), expected) if len(splits) < len(self.splits) else None,
        )

    def _published(self, splits: Sequence[str]) -> Sequence[str]:
        """Return the published splits that hold `splits`. Members may be in any of them."""
        return splits if self.members is None else list(LAYOUTS[self.dataset].splits)

    def _members(
        self, card: Card, base: Path, parts: dict[str, Any], rows: dict[str, list[ImageRow]], splits: Sequence[str]
    ) -> dict[str, list[ImageRow]]:
        """Return the rows of the members of `splits`, found among all rows by the digests of their pixels."""
        wanted = card.read_mapping(str(self.members), "splits to members", dict)
        self.check_per_split(f"{card.shown}/{self.members}", "members", wanted)
        by_digest = {
            digest(pixels.tobytes())[:MEMBER_DIGITS]: row
            for split, part in parts.items()
            for pixels, row in zip(np.asarray(part.data), rows[split], strict=True)
        }
        found: dict[str, list[ImageRow]] = {}
        for split in splits:
            members = wanted[split]
            absent = [name for name, pixels in members.items() if pixels not in by_digest]
            if absent:
                raise UserError(
                    f"{card.shown}: {len(absent):,} of {len(members):,} members of split '{split}' are not in the copy of "
                    f"{self.dataset} under {shown_path(base)}, first '{absent[0]}'. {fix(card)}"
                )
            found[split] = [by_digest[pixels]._replace(name=name) for name, pixels in members.items()]
        return found

    def _construct(self, card: Card, base: Path, split: str, download: bool = False) -> Any:
        import torchvision

        arguments = LAYOUTS[self.dataset].splits[split]
        try:
            with _NoPrograms.used():
                return getattr(torchvision.datasets, self.dataset)(str(base), download=download, **arguments)
        except _REFUSED as error:
            reason = " ".join(str(error).split())
            act = "could not download" if download else "could not open"
            copy = f"{self.dataset} (split '{split}') under {shown_path(base)}"
            raise UserError(f"{card.shown}: torchvision {act} {copy}: {reason}. {fix(card)}") from error


class _NoPrograms:
    """Blocks in which Pillow starts no Ghostscript. torchvision opens files with all formats, even an EPS called x.jpg."""

    lock: ClassVar[threading.Lock] = threading.Lock()
    blocks: ClassVar[int] = 0
    stock: ClassVar[Any] = None  # Pillow's setting outside of the blocks

    @classmethod
    @contextmanager
    def used(cls) -> Iterator[None]:
        from PIL import EpsImagePlugin as eps

        with cls.lock:
            if not cls.blocks:
                cls.stock, eps.gs_binary = eps.gs_binary, False
            cls.blocks += 1
        try:
            yield
        finally:
            with cls.lock:
                cls.blocks -= 1
                if not cls.blocks:
                    eps.gs_binary = cls.stock


def _labels(dataset: object, layout: DatasetLayout) -> list[int]:
    stored = layout.labels(dataset) if callable(layout.labels) else getattr(dataset, layout.labels)
    return [int(item[1] if isinstance(item, (tuple, list)) else item) for item in stored]
