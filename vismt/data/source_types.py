"""The content of a card: a data set and its sources, the places and forms in which copies of it exist.

Each kind of source is a dataclass in the file with its reader. Its fields are the keys of its entry in a card. It checks its
own values, lists its own files and loads its own splits. `@source_kind("name")` registers it as `kind: name`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from vismt.base import console
from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.registry import Registry
from vismt.config.typed import RelativePath, relative_path, within
from vismt.storage.files import JsonObject, parse_json
from vismt.storage.paths import data_roots, package_folder, regular_file, shipped

Files = Mapping[str, Sequence[tuple[str, Path]]]  # group of a manifest -> (name inside the set, file)
S = TypeVar("S", bound="DataSource")

PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image"}  # module -> package with images inside
MOST_CLASSES = 1_000_000  # largest number of classes of a card
NEAR_DUPLICATES, NONE = "near-duplicates", "none"  # values of `groups` of a card that do not name a file
LAST_NUMBER = re.compile(r"^(.*?)([0-9]{1,18})[^0-9]*$")
SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
DATA_KINDS: Registry[type[DataSource]] = Registry(
    "sources: no kind",
    {
        "arrays": "vismt.data.formats.arrays",
        "dense": "vismt.data.formats.dense_files",
        "digits": "vismt.data.formats.embedded",
        "filelist": "vismt.data.formats.json_lists",
        "folder": "vismt.data.formats.folder",
        "interactions": "vismt.data.formats.interaction_files",
        "lists": "vismt.data.formats.id_lists",
        "meta_dataset": "vismt.data.formats.meta_dataset",
        "photo_crops": "vismt.data.formats.embedded",
        "python_topics": "vismt.data.formats.embedded",
        "stereo_tiles": "vismt.data.formats.stereo",
        "table": "vismt.data.formats.csv_table",
        "text": "vismt.data.formats.text_files",
        "torchvision": "vismt.data.formats.torchvision_sets",
    },
)


def source_kind(name: str) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that registers a source as `kind: name`."""

    def register(cls: type[S]) -> type[S]:
        cls.kind = name
        DATA_KINDS.add(name, cls)
        return cls

    return register


def check_names(names: Iterable[str]) -> None:
    """Raise UserError for a name of a file or folder that is not UTF-8. No record, report or digest can hold such a name."""
    bad = next((name for name in names if name != console.printable(name)), None)
    if bad is not None:
        raise UserError(f"'{console.printable(bad)}': the name of the file or folder is not UTF-8; rename it.")


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """One way to get a data set.

    Attributes:
        splits: Number of examples of each split, None if unknown. The default is "all", the only split of a set without splits.
        classes: Number of classes, if this copy has another number than the card says.
        manifest: JSON file beside the card with the hashes of the files, which `vismt data record` writes.
    """

    splits: dict[str, int | None] = field(default_factory=lambda: {"all": None})
    classes: Annotated[int, within(1, MOST_CLASSES)] | None = None
    manifest: RelativePath | None = None

    kind: ClassVar[str] = ""
    unit: ClassVar[str] = "images"  # what the numbers of `splits` count
    family: ClassVar[str] = ""  # name in errors
    opener: ClassVar[str] = ""  # function that opens sources of this family
    package: ClassVar[str | None] = None  # module of the Python package that carries the files

    def check(self, where: str) -> None:
        """Raise UserError, starting with `where`, for values that do not go together."""
        if not self.splits:
            raise UserError(
                f"{where}: 'splits' is empty: name each split and its number of {self.unit} (null when unknown)."
            )
        for split, count in self.splits.items():
            if not SPLIT_NAME.fullmatch(split) or (split == "all" and len(self.splits) > 1):
                raise UserError(
                    f"{where}: '{split}' cannot name a split beside others; 'all' means every {self.unit[:-1]}."
                )
            if count is not None and count < 1:
                raise UserError(f"{where}: split '{split}' has {count} {self.unit}; a count is at least 1.")

    def check_per_split(self, where: str, key: str, names: Iterable[str]) -> None:
        """Raise UserError unless the mapping `key` names the splits and nothing else."""
        if set(names) != set(self.splits):
            given = f"'{key}' names {sorted(names)}, 'splits' names {sorted(self.splits)}"
            raise UserError(f"{where}: {given}; they must agree.")

    @abstractmethod
    def candidates(self, card: Card) -> list[Path]:
        """Return the folders where the copy may be, in order."""

    def list_files(self, base: Path) -> Files:
        """Return the files of the copy in the folder `base`, in the groups that a manifest hashes. By default: {}."""
        return {}

    @abstractmethod
    def load(self, card: Card, base: Path, split: str) -> Any:
        """Return `split` ("all" for every split) of the copy in the folder `base`, with `ids`."""

    def count_images(self, base: Path, split: str) -> int:
        """Return how many images of `split` a copy has that cannot be loaded. Return 0 if that cannot be known."""
        return 0

    @property
    def downloadable(self) -> bool:
        """Whether `download` can fetch the copy."""
        return False

    def download(self, card: Card, base: Path) -> None:
        """Fetch every split into the new folder `base`."""
        raise UserError(f"{card.shown}: a source of kind {self.kind} cannot be downloaded.")

    def wanted(self, split: str) -> list[str]:
        """Return the splits that `split` stands for."""
        return list(self.splits) if split == "all" else [split]


def set_folder(text: str, name: str) -> str:
    """Return an absolute path, or a relative path that stays inside its folder.

    Otherwise raise a UserError that starts with `name`.
    """
    if text == "." or text.startswith("~") or Path(text).is_absolute():
        return text
    return relative_path(text, name)


@dataclass(frozen=True, kw_only=True)
class RootedSource(DataSource):
    """A source in a folder.

    root: Absolute folder, or a folder beside a user's card, or below a folder of VISMT_DATA.
    """

    root: Annotated[str, set_folder] = "."

    def candidates(self, card: Card) -> list[Path]:
        own = Path(self.root).expanduser()
        if own.is_absolute():
            return [own]
        beside = [] if card.folder.parent == shipped("datasets") else [card.folder]
        return [folder / own for folder in (*beside, *data_roots())]


class PackagedSource(DataSource):
    """A source inside an installed Python package."""

    fixed_splits: ClassVar[tuple[str, ...]] = ()  # splits of the set, empty if the card chooses them

    def check(self, where: str) -> None:
        super().check(where)
        if self.fixed_splits:
            require_known(f"{where}: {self.kind} has no split", self.splits, self.fixed_splits)

    def candidates(self, card: Card) -> list[Path]:
        folder = package_folder(self.package) if self.package else None
        return [folder] if folder else []


def file_groups(base: Path, names: Iterable[str]) -> Files:
    """Return each of the files `names` in `base` as a group with the file's name. A missing file is an empty group."""
    return {name: [(name, base / name)] if (base / name).is_file() else [] for name in dict.fromkeys(names)}


def blocks_of_frames(ids: Sequence[str], size: int) -> dict[str, str]:
    """Return the block of each frame. A block is `size` neighbours of one video.

    The rest of a video is a block of its own if it has at least size / 2 frames. The names of the frames of a video are equal
    up to their last number, which gives their order.
    """
    videos: dict[str, list[tuple[int, str]]] = {}
    for name in ids:
        found = LAST_NUMBER.search(Path(name).with_suffix("").as_posix())
        video, number = (found[1], int(found[2])) if found else (name, 0)
        videos.setdefault(video, []).append((number, name))
    blocks = {}
    for video, frames in videos.items():
        last = max(0, math.floor(len(frames) / size + 0.5) - 1)
        for place, (_, name) in enumerate(sorted(frames)):
            blocks[name] = f"{video} {min(place // size, last)}"
    return blocks


@dataclass(frozen=True)
class Card:
    """A data set: what it is, under which terms, and its sources.

    `sources` are tried in order. Each has its own splits and counts, because a copy may be a subset.

    Attributes:
        classes: Number of classes. 0 for a set without classes and for an unknown number.
        images: Number of images (or rows) of the full set, if the first source is only a part.
        names: Readable names of the classes: a list in class order, or a JSON file beside the card with this list or with class
            folder -> name.
        superclasses: JSON file beside the card with class -> superclass, or "prefix" for the part before the last "/".
        groups: Groups that a division into shares keeps in one part: a JSON file beside the card with image -> group,
            "near-duplicates" (every image is decoded, near_duplicates.py), or "none". The default is near-duplicates in sets of
            images with classes of up to 20,000 images.
        frames: Number of neighbouring frames of a video that are a group, instead of `groups`, because one frame tells what the
            next shows. The names of frames are equal up to their last number.
        unit: Name of a group, in the plural, as reports name it: "signs".
        same_images_as: Name of the card of another publication of the same images, or of a larger set that has these images. A
            run does not train on one of these sets and test on another.
        path: File of the card.
        shown: Folder of the card, as messages name it.
    """

    name: str
    sources: list[DataSource]
    title: str = ""
    source: str = ""
    licence: str = ""
    classes: Annotated[int, within(0, MOST_CLASSES)] = 0
    citation: str = ""
    tasks: list[str] = field(default_factory=lambda: ["classification"])
    images: int | None = None
    notes: str = ""
    how_to_get: str = ""
    names: RelativePath | list[str] | None = None
    superclasses: RelativePath | None = None
    groups: str | None = None
    frames: Annotated[int, within(2)] | None = None
    unit: str = ""
    same_images_as: str | None = None
    path: Path = Path()
    shown: str = ""

    @property
    def folder(self) -> Path:
        """Folder of the card, its manifest and its split lists."""
        return self.path.parent

    @property
    def splits(self) -> list[str]:
        """Every split that a source offers, in order."""
        return list(dict.fromkeys(split for source in self.sources for split in source.splits))

    @property
    def downloadable(self) -> bool:
        return any(source.downloadable for source in self.sources)

    def sources_of(self, family: type[S]) -> list[S]:
        """Return the sources of a family such as ImageSource, in order."""
        return [source for source in self.sources if isinstance(source, family)]

    def read_groups(self, default: str, ids: Sequence[str]) -> Mapping[str, Hashable] | None:
        """Return {image: group}. Return {} for no groups, and None if near-duplicates have to be found.

        default: Value of `groups` of a card without the key. ids: Names of the images.
        """
        if self.frames is not None:
            return blocks_of_frames(ids, self.frames)
        name = default if self.groups is None else self.groups
        if name in (NEAR_DUPLICATES, NONE):
            return {} if name == NONE else None
        return self.read_mapping(name, "images to groups", str, int)

    @property
    def group_unit(self) -> str:
        """Name of a group, in the plural."""
        return self.unit or ("groups" if self.frames is None else "blocks of frames")

    def read_mapping(self, name: str, what: str, *kinds: type) -> JsonObject:
        """Return the object in a JSON file beside the card. Its values are of `kinds`.

        what: "key to value", for the error.
        """
        values = self.read_json(name)
        wrong = [values]
        if isinstance(values, dict):
            wrong = [{key: value} for key, value in values.items() if type(value) not in kinds]
        if wrong:
            types = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.shown}/{name}: must map {what} ({types}), holds {shown_value(wrong[0])}.")
        return values

    def read_names(self) -> Any:
        """Return the names of the classes as `names` gives them. Return None without the key."""
        return self.read_json(self.names) if isinstance(self.names, str) else self.names

    def read_json(self, name: str) -> Any:
        path = self.folder / relative_path(name, f"{self.shown}/card.yaml")
        try:
            return parse_json(regular_file(path).read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.shown}/{name}: cannot be read: {error}.") from error
