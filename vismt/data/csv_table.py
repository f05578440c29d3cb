"""Images with their labels in a csv table: a column with the label's text, or one column a class with 0 and 1."""

from __future__ import annotations

import csv
from pathlib import Path

from vismt.data.cards import Card
from vismt.data.decode import decode_file
from vismt.data.manifest import digest
from vismt.data.source_types import TableSource
from vismt.data.sources import Loaded, fix, shown_path, verify_classes, verify_counts
from vismt.data.typed_yaml import inside
from vismt.errors import UserError, near


def files(source: TableSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The tables, each the group of its own name."""
    names = dict.fromkeys(_tables(source).values())
    return {name: [(name, base / name)] if (base / name).is_file() else [] for name in names}


def _tables(source: TableSource) -> dict[str, str]:
    return source.table if isinstance(source.table, dict) else {"all": source.table}


def _one_hot(row: dict[str, str], keep: list[str], where: str) -> str:
    try:
        marked = [name for name in keep if float(row[name]) != 0]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the columns {keep} must hold 0 or 1 ({error}).") from error
    if len(marked) != 1:
        raise UserError(f"{where}: {len(marked)} of the columns {keep} are not 0, must be one.")
    return marked[0]


def read_rows(card: Card, source: TableSource, base: Path, split: str) -> list[tuple[str, str]]:
    """(file name, class) of each row of the split whose class is in `keep`; a row of several findings is in none."""
    path = base / _tables(source)[split]
    shown = shown_path(path)
    only = source.only.get(split, {})
    columns = [source.column, *([source.label] if source.label else source.keep), *only]
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            absent = next((name for name in columns if name not in (table.fieldnames or ())), None)
            if absent is not None:
                raise UserError(f"{shown}: no column '{absent}'.{near(absent, table.fieldnames or ())}")
            for row in table:
                if any(row[name] != text for name, text in only.items()):
                    continue
                where = f"{shown}: line {table.line_num}"
                name = inside((row[source.column] or "") + source.suffix, where)
                kind = row[source.label] if source.label else _one_hot(row, source.keep, where)
                if kind in source.keep:
                    rows.append((name, kind))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{card.shown}: table '{shown}' cannot be read: {error}. {fix(card)}") from error
    return rows


def _find(card: Card, source: TableSource, base: Path, names: list[str]) -> list[Path]:
    """The file of each name in the first of the folders that has it."""
    folders = [folder for pattern in source.folders for folder in sorted(base.glob(pattern)) if folder.is_dir()]
    paths = [next((p for folder in folders if (p := folder / name).is_file()), None) for name in names]
    absent = [name for name, path in zip(names, paths) if path is None]
    if absent:
        raise UserError(
            f"{card.shown}: {len(names) - len(absent):,} of {len(names):,} images found in {', '.join(source.folders)} under "
            f"{shown_path(base)}; missing '{absent[0]}'{' ...' if len(absent) > 1 else ''}. {fix(card)}"
        )
    return [path for path in paths if path is not None]


def load(card: Card, source: TableSource, base: Path, split: str) -> Loaded:
    """The rows of `split` ('all' = every split), labels in the order of `keep`; ids are paths relative to `base`.

    Raises UserError for a missing table, column or image, a row that marks no class or several, a name that leaves the
    folder and a class without images.
    """
    parts = {name: read_rows(card, source, base, name) for name in (source.splits if split == "all" else [split])}
    rows = [row for part in parts.values() for row in part]
    paths = _find(card, source, base, [name for name, _ in rows])
    labels = [source.keep.index(kind) for _, kind in rows]
    verify_counts(card, source, base, {name: len(part) for name, part in parts.items()}, {})
    verify_classes(card, source, base, len(set(labels)))
    ids = [path.relative_to(base).as_posix() for path in paths]
    # The labels are not in the image files: they have to be part of what tells one content from another.
    return Loaded(
        list(source.keep),
        labels,
        ids,
        lambda i: decode_file(paths[i]),
        lambda: f"{digest(zip(ids, paths)).sha256}:{labels}",
    )
