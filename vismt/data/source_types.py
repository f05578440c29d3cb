"""Kinds of sources: for each way a set lies on disk, what a card says of it (its reader is a file of its own)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vismt.data.interaction_kind import InteractionsSource
from vismt.data.text_kind import TextSource

META_SPLITS = ("train", "valid", "test")
LIST_SPLITS = ("train", "test")
HIERARCHIES = ("superclass", "nodes")
# What the files of a dense map hold (how: dense_maps.py) -> the target it becomes.
DENSE_MAPS = {
    "label": "semseg", "depth_mm": "depth", "depth_m": "depth", "depth_512": "depth", "inverse_depth": "depth",
    "normal": "normals", "normal_255": "normals", "edge": "edge", "saliency": "saliency",
    "pascal_parts": "parts", "pascal_context": "edge",
}  # fmt: skip
DERIVED = {"normals": ("depth",), "edge": ("semseg", "depth")}  # target -> what it can be computed from
CAMERA = ("fx", "fy", "cx", "cy")


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
    """Images with per-pixel maps. `image` and the values of `maps` are paths without suffix: `{split}` and `{group}` name
    folders, `{id}` the image in the file name; a path without {id} is a folder of such files, a list is searched in order.

    The names in `maps` say what the files hold (DENSE_MAPS). `listed` is a text file with one id a line, or one group a
    line where `image` has {group}. With `partial` a sample lacks the targets whose file is not there; else that is an error.
    `first` is the label of class 0, `void` the label of no class; `edge_above` is the share of the largest value from
    which a pixel is an edge; `axes` holds the signs that turn stored normals to x right, y up, z towards the camera.
    `derive` maps a target that the set lacks to the one it is computed from ({edge: semseg}), edges at the size they are used
    in, normals at that of the stored maps, for which they need the `camera` (fx, fy, cx, cy in pixels). `normal_classes`
    is a JSON beside the card, see pascal_context.py.
    """

    root: str
    image: str
    maps: dict[str, str | list[str]]
    splits: dict[str, int | None]
    void: int | None = None
    first: int = 0
    listed: str | None = None
    partial: bool = False
    edge_above: float = 0.5
    axes: list[int] = field(default_factory=lambda: [1, 1, 1])
    derive: dict[str, str] = field(default_factory=dict)
    camera: dict[str, float] = field(default_factory=dict)
    normal_classes: str | None = None
    classes: int | None = None
    manifest: str | None = None
    kind: str = "dense"


@dataclass(frozen=True)
class StereoTilesSource:
    """Tiles of the left image of a rectified stereo pair that scikit-image ships, with maps from its true disparity.

    depth = fx * baseline / (disparity + offset), metres; `camera` and `offset` in pixels, `baseline` in metres. Normals and
    edges are derived from the depth. `columns` maps each split to the columns [from, to) it may see, `grid` to its rows
    and columns of tiles, spread evenly; `tile` is their height and width.
    """

    image: str
    disparity: str
    camera: dict[str, float]
    baseline: float
    offset: float
    tile: list[int]
    columns: dict[str, list[int]]
    grid: dict[str, list[int]]
    splits: dict[str, int | None]
    classes: int | None = None
    manifest: str | None = None
    kind: str = "stereo_tiles"


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
    | StereoTilesSource | MetaDatasetSource | TableSource | FilelistSource | LabelListSource | TextSource
    | InteractionsSource
)  # fmt: skip
DENSE = (DenseSource, StereoTilesSource)  # what open_dense opens
TEXTS = (TextSource, InteractionsSource)  # what open_texts opens; open_images opens the others
KINDS: dict[str, type] = {
    cls.kind: cls
    for cls in (
        FolderSource, ArraysSource, DigitsSource, PhotoCropsSource, TorchvisionSource, DenseSource,
        StereoTilesSource, MetaDatasetSource, TableSource, FilelistSource, LabelListSource, TextSource, InteractionsSource,
    )
}  # fmt: skip


def counted(source: Source) -> str:
    """What the numbers of a source's splits count."""
    return "rows" if isinstance(source, TEXTS) else "images"
