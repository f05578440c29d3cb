"""Cards: what a data set is, under which terms, how it lies on disk and where it comes from (datasets/<name>/card.yaml)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismt.data.strict import build, inside, read_yaml
from vismt.errors import UserError, near
from vismt.paths import shipped

SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
LAYOUTS = ("{class}", "{split}/{class}", "**/{class}", "{split}/**/{class}")
CARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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


Source = FolderSource | ArraysSource | DigitsSource | PhotoCropsSource | TorchvisionSource | DenseSource
KINDS: dict[str, type] = {
    cls.kind: cls
    for cls in (FolderSource, ArraysSource, DigitsSource, PhotoCropsSource, TorchvisionSource, DenseSource)
}


@dataclass(frozen=True)
class Card:
    """One data set. `sources` are tried in order; each has its own splits and counts (a copy may be a subset)."""

    name: str
    title: str
    source: str
    licence: str
    classes: int
    sources: list[Source]
    citation: str = ""
    tasks: list[str] = field(default_factory=lambda: ["classification"])
    images: int | None = None  # images in the full published set, when the first source is only a part
    notes: str = ""
    how_to_get: str = ""
    names: str | None = None  # JSON beside the card: class folder -> readable name; or a list in class order
    superclasses: str | None = None  # JSON beside the card: class -> superclass; or 'prefix': the part before the last '/'
    path: Path = Path()
    shown: str = ""

    @property
    def folder(self) -> Path:
        """Where the card lies, with its manifest and split lists."""
        return self.path.parent

    @property
    def dense(self) -> bool:
        return all(isinstance(source, DenseSource) for source in self.sources)

    @property
    def splits(self) -> list[str]:
        """Every split that some source offers, in order."""
        return list(dict.fromkeys(split for source in self.sources for split in source.splits))

    @property
    def downloadable(self) -> bool:
        return any(isinstance(source, TorchvisionSource) and source.downloads for source in self.sources)

    def read_json(self, name: str) -> Any:
        """The parsed JSON file `name` beside the card."""
        path = self.folder / inside(name, f"{self.shown}/card.yaml")
        try:
            return json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.shown}/{name}: cannot be read: {error}.") from error


def _source(raw: object, shown: str) -> Source:
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{shown}: kind {kind!r} is not known.{near(str(kind), KINDS)}")
    source: Source = build(KINDS[kind], raw, f"{shown} ({kind})")
    for key in ("root", "file", "manifest", "image"):
        text = getattr(source, key, None)
        if text is not None:
            inside(text, f"{shown}.{key}")
    groups = [getattr(source, name, {}) for name in ("maps", "lists", "photographs")]
    for text in [text for group in groups for text in group.values()]:
        inside(text, shown)
    if not source.splits:
        raise UserError(f"{shown}: 'splits' is empty: name each split and its number of images (null when unknown).")
    for split, count in source.splits.items():
        if not SPLIT_NAME.fullmatch(split) or (split == "all" and len(source.splits) > 1):
            raise UserError(f"{shown}: '{split}' cannot name a split beside others; 'all' means every image.")
        if count is not None and count < 1:
            raise UserError(f"{shown}: split '{split}' has {count} images; a count is at least 1.")
    if isinstance(source, FolderSource):
        _check_layout(source, shown)
    return source


def _check_layout(source: FolderSource, shown: str) -> None:
    inside(source.layout, f"{shown}.layout")
    if source.layout not in LAYOUTS:
        raise UserError(f"{shown}: layout '{source.layout}' is not known.{near(source.layout, LAYOUTS)}")
    if source.lists and set(source.lists) != set(source.splits):
        names = f"'lists' names {sorted(source.lists)}, 'splits' names {sorted(source.splits)}"
        raise UserError(f"{shown}: {names}; they must agree.")
    if not source.lists and "{split}" not in source.layout and list(source.splits) != ["all"]:
        raise UserError(f"{shown}: layout '{source.layout}' has no {{split}}: name one split 'all', or give 'lists'.")


def _locate(name: str | Path) -> tuple[Path, str]:
    text = str(name)
    beside = shipped("datasets") / text / "card.yaml"
    if CARD_NAME.fullmatch(text) and beside.is_file():
        return beside, f"datasets/{text}"
    given = Path(name).expanduser()
    path = given / "card.yaml" if given.is_dir() else given
    if path.is_file() and path.suffix in {".yaml", ".yml"}:
        return path.resolve(), str(path.parent)
    raise UserError(f"data '{text}': no card of that name and no card.yaml at that path.{near(text, list_cards())}")


def load_card(name_or_path: str | Path) -> Card:
    """The card called `name_or_path`, or the one in that folder or file.

    Raises UserError (near name, the card's path and key) for an unknown name, an unknown or missing key, a value of
    the wrong type, or a path that leaves its folder.
    """
    path, shown = _locate(name_or_path)
    where = f"{shown}/{path.name}"
    raw = read_yaml(path, where)
    sources = raw.get("sources")
    if not isinstance(sources, list) or not sources:
        raise UserError(f"{where}: 'sources' must be a list with at least one entry (kinds: {', '.join(KINDS)}).")
    parsed = [_source(source, f"{where}: sources[{index}]") for index, source in enumerate(sources)]
    rest = {key: value for key, value in raw.items() if key != "sources"}
    card = build(Card, rest, where, sources=parsed, path=path, shown=shown)
    if not CARD_NAME.fullmatch(card.name):
        raise UserError(f"{where}: name '{card.name}' must be letters, digits, '_', '-' or '.'.")
    if card.classes < 0 or any(source.classes is not None and source.classes < 1 for source in parsed):
        raise UserError(f"{where}: 'classes' must be a count of classes.")
    for key in ("names", "superclasses"):
        if getattr(card, key) is not None:
            inside(getattr(card, key), f"{where}: {key}")
    return card


def list_cards() -> list[str]:
    """Names of the cards that travel with the package, sorted."""
    return sorted(path.parent.name for path in shipped("datasets").glob("*/card.yaml"))
