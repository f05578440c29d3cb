"""Sets without a card: a folder of class folders, a table of paths and labels, rows of text in a csv, jsonl or json file."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.data.decode import is_image_name
from vismt.data.set_entries import DELIMITERS
from vismt.data.source_types import DATA_KINDS, Card, DataSource
from vismt.storage.paths import regular_file

# Names of folders that are splits, not classes, in any case, and the part of a study that each of them is.
SPLITS = {name: "train" for name in ("train", "training")}
SPLITS |= {name: "validation" for name in ("val", "valid", "validation", "dev")}
SPLITS |= {name: "test" for name in ("test", "testing")}
_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
_LABELS = ("label", "class", "category", "target", "label_name", "class_name")
SPLIT = "split"  # column with the split of a row


def plain_card(path: Path) -> Card | None:
    """Return the card of a folder of class folders or of a csv, tsv, jsonl or json file. Return None for any other path.

    Folders with the names of splits hold the class folders of each split. Raise UserError for a folder or table that cannot be
    read.
    """
    sources: list[DataSource] = []
    if path.is_dir():
        try:
            sources = _of_folder(path.resolve())
        except OSError as error:
            raise UserError(f"data '{path}': the folder cannot be read: {error.strerror}.") from error
    elif path.is_file() and path.suffix in DELIMITERS:
        sources = _of_table(path.resolve())
    elif path.is_file() and path.suffix in (".jsonl", ".json"):
        sources = [_source("text", root=str(path.resolve().parent), files={"all": path.name})]
    name = re.sub(r"[^\w.-]", "-", path.resolve().name if path.is_dir() else path.stem)
    return Card(name, sources, path=path.resolve(), shown=str(path)) if sources else None


def _of_folder(path: Path) -> list[DataSource]:
    folders = _folders(path)
    by_split = bool(folders) and all(folder.name.lower() in SPLITS for folder in folders)
    classes = [inner for folder in folders for inner in _folders(folder)] if by_split else folders
    if not classes:
        return []
    deep = "" if any(is_image_name(file.name) for folder in classes for file in folder.iterdir()) else "**/"
    splits = {folder.name: None for folder in folders} if by_split else {"all": None}
    return [_source("folder", root=str(path), layout=f"{'{split}/' * by_split}{deep}{{class}}", splits=splits)]


def _source(kind: str, **values: object) -> DataSource:
    """Return a source of a kind. Its file is imported now, because it may need cards itself."""
    make: Any = DATA_KINDS[kind]
    return make(**values)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _of_table(path: Path) -> list[DataSource]:
    """Return the sources of a table: rows of text, and images if one column has their paths and another their labels."""
    try:
        with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
            columns = list(table.fieldnames or ())
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read as a table: {error}.") from error
    if not rows:
        raise UserError(f"'{path}': has no rows; write the names of the columns, then a line for each example.")
    texts = _source("text", root=str(path.parent), files={"all": path.name}, form="csv")
    column, label = (next((name for name in columns if name.lower() in names), None) for names in (_PATHS, _LABELS))
    if column is None or label is None:
        return [texts]
    labels = {row[label] or "" for row in rows}
    # Python reads no number of thousands of digits.
    in_numbers = all(re.fullmatch(r"-?[0-9]{1,100}", text) for text in labels)
    splits = sorted({row[SPLIT] or "" for row in rows}) if SPLIT in columns else ["all"]
    images = _source(
        "table",
        root=str(path.parent),
        splits=dict.fromkeys(splits),
        table=dict.fromkeys(splits, path.name),
        folders=["."],
        column=column,
        label=label,
        keep=sorted(labels, key=int if in_numbers else str),
        only={name: {SPLIT: name} for name in splits} if SPLIT in columns else {},
    )
    images.check(f"'{path}'")
    return [images, texts]
