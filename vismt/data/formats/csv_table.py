"""Images with their labels in a csv table: a column with the text of the label, or one column for each class with 0 and 1."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from vismt.base.errors import UserError, require_known
from vismt.config.typed import RelativePath, relative_path
from vismt.data.copies import fix, listed, shown_path
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.set_entries import DELIMITERS
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind
from vismt.storage.paths import regular_file


@source_kind("table")
@dataclass(frozen=True, kw_only=True)
class TableSource(RootedSource, ImageSource):
    """A csv table beside folders of images.

    Attributes:
        table: One file for the one split "all", or a file for each split. A .tsv file has tabs between its columns.
        folders: Folders that are searched in turn for the images. They may hold `*`.
        column: Column of the file names, without their `suffix` if one is given.
        keep: Classes in order. Rows with another label are left out.
        label: Column of the label's text. null if the label is the one column of `keep` that is not 0.
        suffix: Suffix of every file name.
        only: Rows of a split, as columns with the text that they hold: {test: {Usage: Private}}.
    """

    table: RelativePath | dict[str, RelativePath]
    folders: list[RelativePath]
    column: str
    keep: list[str]
    label: str | None = None
    suffix: str = ""
    only: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, str]:
        return self.table if isinstance(self.table, dict) else {"all": self.table}

    def check(self, where: str) -> None:
        super().check(where)
        if not 0 < len(set(self.keep)) == len(self.keep):
            raise UserError(f"{where}: 'keep' names each class once.")
        if set(self.tables) != set(self.splits):
            names = f"'table' is for {sorted(self.tables)}, 'splits' names {sorted(self.splits)}"
            raise UserError(
                f"{where}: {names}; a table has the one split 'all', or 'table' maps each split to its file."
            )
        require_known(f"{where}: 'only' names no split", self.only, self.splits)

    def list_files(self, base: Path) -> Files:
        return file_groups(base, self.tables.values())

    def count_images(self, base: Path, split: str) -> int:
        try:
            entries = self._read_rows(Card("", [self]), base, split)
        except UserError:
            return 0
        return sum(path is not None for path in self._paths(base, [name for name, _ in entries]))

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the rows of the tables, labels in the order of `keep`. Ids are paths relative to `base`."""
        number = {name: label for label, name in enumerate(self.keep)}
        rows: dict[str, list[ImageRow]] = {}
        for split in splits:
            entries = self._read_rows(card, base, split)
            paths = self._find(card, base, [name for name, _ in entries])
            rows[split] = [
                ImageRow(path.relative_to(base).as_posix(), number[label], path)
                for path, (_, label) in zip(paths, entries, strict=True)
            ]
        # Every class of the table must have an image.
        return Listing(list(self.keep), rows, counted=len({row.label for part in rows.values() for row in part}))

    def _read_rows(self, card: Card, base: Path, split: str) -> list[tuple[str, str]]:
        """Return (file name, class) of each row of the split with one class, if the class is in `keep`."""
        path = base / self.tables[split]
        shown = shown_path(path)
        only = self.only.get(split, {})
        columns = [self.column, *([self.label] if self.label else self.keep), *only]
        rows, kept = [], set(self.keep)
        label_of: dict[Path, str] = {}
        try:
            with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file, delimiter=DELIMITERS.get(path.suffix, ","))
                require_known(f"{shown}: no column", columns, table.fieldnames or ())
                for row in table:
                    where = f"{shown}: line {table.line_num}"
                    short = next((name for name in columns if row[name] is None), None)
                    if short is not None:
                        raise UserError(f"{where}: has no '{short}', as it has fewer columns than the first line.")
                    if any(row[name] != text for name, text in only.items()):
                        continue
                    name = relative_path(_inside(row[self.column], base) + self.suffix, where)
                    label = row[self.label] if self.label else _one_hot(row, self.keep, where)
                    if label in kept:
                        if not label:  # a table without a card, whose labels are all kept
                            raise UserError(f"{where}: '{name}' has no label; give it one, or leave the row out.")
                        if (other := label_of.setdefault(Path(name), label)) != label:
                            raise UserError(
                                f"{where}: '{name}' is '{label}', above '{other}'; give each image one label."
                            )
                        rows.append((name, label))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{card.shown}: table '{shown}' cannot be read: {error}. {fix(card)}") from error
        return rows

    def _paths(self, base: Path, names: list[str]) -> list[Path | None]:
        # Path.glob raises for some patterns (a**b), and for others in every version of Python.
        found = (base / name for text in self.folders for name in glob(text, root_dir=base, recursive=True))
        folders = [path for path in found if path.is_dir()]
        return [next((p for folder in folders if (p := folder / name).is_file()), None) for name in names]

    def _find(self, card: Card, base: Path, names: list[str]) -> list[Path]:
        paths = self._paths(base, names)
        absent = [f"'{name}'" for name, path in zip(names, paths, strict=True) if path is None]
        if absent:
            raise UserError(
                f"{card.shown}: {len(names) - len(absent):,} of {len(names):,} images found in {', '.join(self.folders)} under "
                f"{shown_path(base)}; missing {listed(absent, 1)}. {fix(card)}"
            )
        return [path for path in paths if path is not None]


def _inside(name: str, base: Path) -> str:
    path = Path(name)
    return path.relative_to(base).as_posix() if path.is_absolute() and path.is_relative_to(base) else name


def _one_hot(row: dict[str, str], keep: list[str], where: str) -> str:
    try:
        marked = [name for name in keep if float(row[name]) != 0]
    except ValueError as error:
        raise UserError(f"{where}: the columns {keep} must hold 0 or 1 ({error}).") from error
    if len(marked) != 1:
        raise UserError(f"{where}: {len(marked)} of the columns {keep} are not 0, must be one.")
    return marked[0]
