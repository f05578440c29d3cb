"""Kinds of sources: for each way a set lies on disk, what a card says of it (its reader is a file of its own)."""

from __future__ import annotations

from dataclasses import dataclass, field

META_SPLITS = ("train", "valid", "test")
LIST_SPLITS = ("train", "test")
HIERARCHIES = ("superclass", "nodes")


@dataclass(frozen=True)
class FolderSource:
    """Image files in class folders.

    `layout` says where the class folder is: `{class}`, `{split}/{class}`, or with `**/` before `{class}` at any depth.
    `lists` maps a split to a text file beside the card with one image path (relative to `root`) a line.
    """

    root: str
    layout: str
    splits: dict[str, int | None]
    lists: dict[str, str] = field(default_factory=dict)
    classes: int | None = None
    manifest: str | None = None
    kind: str = "folder"


@dataclass(frozen=True)
class ArraysSource:
    """One npz file: `x_<split>`, `y_<split>`; for the single split 'all' `x`, `y`; bits of `x_packed` with `shape`; `classes`."""

    root: str
    file: str
    splits: dict[str, int | None]
    invert: bool = False
    classes: int | None = None
    manifest: str | None = None
    kind: str = "arrays"


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 handwritten digits (8 x 8, 17 grey levels) that scikit-learn ships."""

    splits: dict[str, int | None]
    classes: int | None = None
    manifest: str | None = None
    kind: str = "digits"


@dataclass(frozen=True)
class PhotoCropsSource:
    """Square crops of the photographs that scikit-image ships: `photographs` maps class name to file name."""

    photographs: dict[str, str]
    crops_per_half: int
    splits: dict[str, int | None]
    classes: int | None = None
    manifest: str | None = None
    kind: str = "photo_crops"


@dataclass(frozen=True)
class TorchvisionSource:
    """A class of torchvision.datasets (`dataset`), found in or downloaded to the cache folder under `root`."""

    dataset: str
    root: str
    splits: dict[str, int | None]
    downloads: bool = True
    classes: int | None = None
    manifest: str | None = None
    kind: str = "torchvision"


@dataclass(frozen=True)
class DenseSource:
    """Images with per-pixel maps. `image` and each folder in `maps` is a pattern with `{split}`; files pair by stem.

    `maps` names are what the map holds: `label` (uint8 class index), `depth_mm` (uint16) or `normal` ((n + 1) * 127 + 1).
    """

    root: str
    image: str
    maps: dict[str, str]
    splits: dict[str, int | None]
    void: int | None = None
    classes: int | None = None
    manifest: str | None = None
    kind: str = "dense"


@dataclass(frozen=True)
class MetaDatasetSource:
    """One domain of Meta-Dataset, converted: `dataset_spec.json` beside `<class id>.h5`, or beside a folder per class name.

    The spec numbers the classes: training, validation, test classes in that order; `classes_per_split` says the same for
    copies without it. `hierarchy` ('superclass' or 'nodes') is what the spec adds, and then the spec must be there.
    """

    root: str
    splits: dict[str, int | None]
    classes_per_split: dict[str, int]
    hierarchy: str | None = None
    classes: int | None = None
    manifest: str | None = None
    kind: str = "meta_dataset"


@dataclass(frozen=True)
class TableSource:
    """A csv table beside folders of images. `column` holds the file names, without their `suffix` when one is given.

    The label is the text in the column `label`, or with `label` null the one column of `keep` that is not 0. `keep` names
    the classes in order; rows with another text are left out. `folders` are searched in turn and may hold `*`.
    `table` is one file with the one split 'all', or a file for each split, of which `only` may take the rows where a column
    holds a text: {test: {Usage: Private}}.
    """

    root: str
    table: str | dict[str, str]
    folders: list[str]
    column: str
    keep: list[str]
    splits: dict[str, int | None]
    label: str | None = None
    suffix: str = ""
    only: dict[str, dict[str, str]] = field(default_factory=dict)
    classes: int | None = None
    manifest: str | None = None
    kind: str = "table"


@dataclass(frozen=True)
class FilelistSource:
    """`<split>.json` of label_names, image_names, image_labels. Of an absolute name counts what follows `after`."""

    root: str
    splits: dict[str, int | None]
    classes_per_split: dict[str, int]
    after: str | None = None
    classes: int | None = None
    manifest: str | None = None
    kind: str = "filelist"


@dataclass(frozen=True)
class LabelListSource:
    """Text files with an id first on every line: image id and path below `folder`, image id and class id, image id and 1
    (train) or 0 (test), class id and class name. The order of `names` is that of the classes.
    """

    root: str
    folder: str
    paths: str
    labels: str
    training: str
    names: str
    splits: dict[str, int | None]
    classes: int | None = None
    manifest: str | None = None
    kind: str = "lists"


Source = (
    FolderSource | ArraysSource | DigitsSource | PhotoCropsSource | TorchvisionSource | DenseSource
    | MetaDatasetSource | TableSource | FilelistSource | LabelListSource
)  # fmt: skip
KINDS: dict[str, type] = {
    cls.kind: cls
    for cls in (
        FolderSource, ArraysSource, DigitsSource, PhotoCropsSource, TorchvisionSource, DenseSource,
        MetaDatasetSource, TableSource, FilelistSource, LabelListSource,
    )
}  # fmt: skip
