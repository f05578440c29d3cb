"""Cards: what a data set is, under which terms and where it comes from (datasets/<name>/card.yaml).

How it lies on disk is one of the kinds of sources in kinds.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vismt.data.interaction_kind import InteractionsSource, check_interactions
from vismt.data.source_types import (
    CAMERA,
    DENSE,
    DENSE_MAPS,
    DERIVED,
    HIERARCHIES,
    KINDS,
    LIST_SPLITS,
    META_SPLITS,
    TEXTS,
    DenseSource,
    FilelistSource,
    FolderSource,
    LabelListSource,
    MetaDatasetSource,
    Source,
    StereoTilesSource,
    TableSource,
    TextSource,
    TorchvisionSource,
    counted,
)
from vismt.data.text_kind import check_texts
from vismt.data.typed_yaml import build, inside, read_yaml
from vismt.errors import UserError, near
from vismt.paths import shipped

SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
LAYOUTS = ("{class}", "{split}/{class}", "**/{class}", "{split}/**/{class}")
CARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
    images: int | None = None  # images (or rows) of the full set, when the first source is only a part
    notes: str = ""
    how_to_get: str = ""
    names: str | None = None  # JSON beside the card: class folder -> readable name; or a list in class order
    superclasses: str | None = (
        None  # JSON beside the card: class -> superclass; or 'prefix': the part before the last '/'
    )
    path: Path = Path()
    shown: str = ""

    @property
    def folder(self) -> Path:
        """Where the card lies, with its manifest and split lists."""
        return self.path.parent

    @property
    def dense(self) -> bool:
        return all(isinstance(source, DENSE) for source in self.sources)

    @property
    def textual(self) -> bool:
        return all(isinstance(source, TEXTS) for source in self.sources)

    @property
    def splits(self) -> list[str]:
        """Every split that some source offers, in order."""
        return list(dict.fromkeys(split for source in self.sources for split in source.splits))

    @property
    def downloadable(self) -> bool:
        doors = [source for source in self.sources if isinstance(source, TorchvisionSource) and source.downloads]
        return bool(doors) or any(isinstance(source, InteractionsSource) and source.wheel for source in self.sources)

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
    for key in (
        "root",
        "file",
        "manifest",
        "image",
        "table",
        "folder",
        "paths",
        "labels",
        "training",
        "names",
        "listed",
        "disparity",
        "normal_classes",
    ):
        text = getattr(source, key, None)
        if isinstance(text, str):
            inside(text, f"{shown}.{key}")
    groups = [getattr(source, name, None) for name in ("maps", "lists", "photographs", "table", "files")]
    values = [value for group in groups if isinstance(group, dict) for value in group.values()]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    for text in [*texts, *getattr(source, "folders", ())]:
        inside(text, shown)
    if not source.splits:
        raise UserError(
            f"{shown}: 'splits' is empty: name each split and its number of {counted(source)} (null when unknown)."
        )
    for split, count in source.splits.items():
        if not SPLIT_NAME.fullmatch(split) or (split == "all" and len(source.splits) > 1):
            raise UserError(f"{shown}: '{split}' cannot name a split beside others; 'all' means every image.")
        if count is not None and count < 1:
            raise UserError(f"{shown}: split '{split}' has {count} {counted(source)}; a count is at least 1.")
    if isinstance(source, FolderSource):
        _check_layout(source, shown)
    if isinstance(source, DenseSource):
        _check_dense(source, shown)
    if isinstance(source, StereoTilesSource):
        _check_tiles(source, shown)
    if isinstance(source, (MetaDatasetSource, FilelistSource)):
        _check_classes_per_split(source, shown)
    if isinstance(source, TableSource):
        _check_table(source, shown)
    if isinstance(source, TextSource):
        check_texts(source, shown)
    if isinstance(source, InteractionsSource):
        check_interactions(source, shown)
    if isinstance(source, LabelListSource):
        strange = next((name for name in source.splits if name not in LIST_SPLITS), None)
        if strange is not None:
            raise UserError(
                f"{shown}: no split '{strange}'; 'training' tells train from test.{near(strange, LIST_SPLITS)}"
            )
    return source


def _check_dense(source: DenseSource, shown: str) -> None:
    strange = next((name for name in source.maps if name not in DENSE_MAPS), None)
    if strange is not None:
        raise UserError(f"{shown}: map '{strange}' is not known.{near(strange, DENSE_MAPS)}")
    held = [DENSE_MAPS[name] for name in source.maps]
    if len(set(held)) < len(held):
        raise UserError(f"{shown}: the maps {list(source.maps)} become {held}; each target once.")
    for path in (
        source.image,
        *(p for value in source.maps.values() for p in ([value] if isinstance(value, str) else value)),
    ):
        unknown = [name for name in re.findall(r"{(.*?)}", path) if name not in ("split", "group", "id")]
        if unknown or "{id}" in path.rpartition("/")[0] or path.count("{id}") > 1:
            raise UserError(f"{shown}: '{path}' may hold {{split}} and {{group}}, and {{id}} once, in the file name.")
    if len(source.splits) > 1 and "{split}" not in source.image and source.listed is None:
        raise UserError(f"{shown}: image '{source.image}' has no {{split}}: name one split 'all', or give 'listed'.")
    for target, origin in source.derive.items():
        if origin not in DERIVED.get(target, ()) or origin not in held or target in held:
            known = ", ".join(f"{a} from {b}" for a, names in DERIVED.items() for b in names)
            raise UserError(
                f"{shown}: cannot derive {target} from {origin} of {held} (known: {known}; a target held is read)."
            )
    if "inverse_depth" in source.maps and "depth" in source.derive.values():
        raise UserError(f"{shown}: nothing is derived from inverse_depth, which has no scale.")
    if "normals" in source.derive:
        _check_camera(source, shown)
    if len(source.axes) != 3 or set(source.axes) - {1, -1}:
        raise UserError(f"{shown}: axes {source.axes} must be three signs, 1 or -1.")


def _check_camera(source: DenseSource | StereoTilesSource, shown: str) -> None:
    if set(source.camera) != set(CAMERA) or min(source.camera["fx"], source.camera["fy"]) <= 0:
        raise UserError(f"{shown}: camera {source.camera} must give {', '.join(CAMERA)} in pixels, fx and fy above 0.")


def _check_tiles(source: StereoTilesSource, shown: str) -> None:
    _check_camera(source, shown)
    pairs = [source.tile, *source.columns.values(), *source.grid.values()]
    splits = set(source.splits)
    if any(len(pair) != 2 or min(pair) < 0 for pair in pairs) or not splits == set(source.columns) == set(source.grid):
        raise UserError(f"{shown}: 'tile' must be two counts, 'columns' and 'grid' two for each of {sorted(splits)}.")
    if any(a[1] > b[0] for a, b in pairwise(sorted(source.columns.values()))):
        raise UserError(f"{shown}: the columns {source.columns} of the splits must not overlap.")


def _check_table(source: TableSource, shown: str) -> None:
    if not 0 < len(set(source.keep)) == len(source.keep):
        raise UserError(f"{shown}: 'keep' names each class once.")
    tables = source.table if isinstance(source.table, dict) else {"all": source.table}
    if set(tables) != set(source.splits):
        names = f"'table' is for {sorted(tables)}, 'splits' names {sorted(source.splits)}"
        raise UserError(f"{shown}: {names}; a table has the one split 'all', or 'table' maps each split to its file.")
    strange = next((name for name in source.only if name not in source.splits), None)
    if strange is not None:
        raise UserError(f"{shown}: 'only' names no split '{strange}'.{near(strange, source.splits)}")


def _check_classes_per_split(source: MetaDatasetSource | FilelistSource, shown: str) -> None:
    meta = isinstance(source, MetaDatasetSource)
    known = META_SPLITS if meta else source.splits
    strange = next((name for name in (*source.splits, *source.classes_per_split) if name not in known), None)
    if strange is not None:
        raise UserError(f"{shown}: no split '{strange}'.{near(strange, known)}")
    if any(count < 0 for count in source.classes_per_split.values()):
        raise UserError(f"{shown}: 'classes_per_split' must hold counts of classes.")
    if meta and source.hierarchy not in (None, *HIERARCHIES):
        raise UserError(f"{shown}: hierarchy '{source.hierarchy}' is not known.{near(source.hierarchy, HIERARCHIES)}")


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
