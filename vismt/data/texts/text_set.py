"""Rows of text: the set that `open_texts` returns, the sources that load it, and what several of them share."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from vismt.base.errors import UserError
from vismt.data.cards import Card, load_card
from vismt.data.copies import found_copy, shown_path, verify_counts
from vismt.data.formats.python_sets import python_object, texts_of
from vismt.data.set_entries import row_name
from vismt.data.source_types import DataSource
from vismt.storage.files import parse_json

# str.splitlines takes more line ends. Files mix these three.
LINE_ENDS = re.compile("\r\n|\r|\n")
TextRow = dict[str, Any]  # fields of a row of text by name
T = TypeVar("T", bound="TextSet")


@dataclass
class TextSet:
    """One split.

    Attributes:
        rows: Fields of each row by name, as texts or as the JSON holds them.
        ids: Ids "split:number" of each row, in the file's order.
        content: Text that differs for any other rows.
        where: Folder of the copy, as messages name it.
    """

    name: str
    split: str
    rows: list[TextRow]
    ids: list[str]
    content: Callable[[], str]
    where: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self: T, chosen: Sequence[int]) -> T:
        indices = [int(i) for i in chosen]
        choice = hashlib.sha256(repr(indices).encode()).hexdigest()
        return replace(
            self,
            rows=[self.rows[i] for i in indices],
            ids=[self.ids[i] for i in indices],
            content=lambda: f"{self.content()}:{choice}",
        )


class TextRows(NamedTuple):
    """The rows of some splits of a copy.

    rows: Rows {split: {name of a row: its fields}}. content: See TextSet.
    """

    rows: dict[str, dict[str, TextRow]]
    content: Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class TextSource(DataSource):
    """A source of rows of text."""

    unit: ClassVar[str] = "rows"
    family: ClassVar[str] = "texts"
    opener: ClassVar[str] = "open_texts"
    loads: ClassVar[type[TextSet]] = TextSet

    @abstractmethod
    def read_rows(self, card: Card, base: Path, splits: Sequence[str]) -> TextRows:
        """Return the rows of `splits` of the copy in the folder `base`."""

    def load(self, card: Card, base: Path, split: str) -> TextSet:
        """Return `split` of the copy in the folder `base`, checked against the card."""
        parts, content = self.read_rows(card, base, self.wanted(split))
        verify_counts(card, self, base, {name: len(rows) for name, rows in parts.items()})
        return self.loads(
            name=card.name,
            split=split,
            rows=[row for rows in parts.values() for row in rows.values()],
            ids=[f"{name}:{row}" for name, rows in parts.items() for row in rows],
            content=content,
            where=shown_path(base),
        )


def check_encoding(encoding: str, where: str) -> None:
    """Raise UserError for an encoding of text that Python does not know, or whose codec decodes no text (rot13)."""
    try:
        b"text".decode(encoding)
    except (LookupError, ValueError) as error:
        raise UserError(f"{where}: encoding '{encoding}' is not known: {error}.") from error


def json_lines(text: str, shown: str) -> Iterator[tuple[str, TextRow]]:
    """Yield (where, fields) of each line that is not empty. fields is empty for JSON other than an object."""
    for number, line in enumerate(LINE_ENDS.split(text), 1):
        if line.strip():
            where = f"{shown}: line {number}"
            try:
                values = parse_json(line)
            except ValueError as error:
                raise UserError(f"{where}: is not JSON ({error}).") from error
            yield where, values if isinstance(values, dict) else {}


def json_list(text: str, shown: str) -> Iterator[tuple[str, TextRow]]:
    """Yield (where, fields) of each entry of a JSON list. fields is empty for an entry other than an object."""
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise UserError(f"{shown}: is not JSON ({error}).") from error
    if not isinstance(entries, list):
        raise UserError(
            f"{shown}: is not a list of objects; put them between square brackets, or one a line in a .jsonl file."
        )
    for number, values in enumerate(entries, 1):
        yield f"{shown}: entry {number}", values if isinstance(values, dict) else {}


def open_texts(card: Card | str | Path, split: str = "all") -> TextSet:
    """Return the rows of `split`, from the first of the card's sources that is on this machine and has that split.

    Args:
        card: Card, its name, its file or its folder, a csv, jsonl or json file, or the name of a Python object.
        split: Name of a split, or "all" for every split.

    Raises:
        UserError: If the card or split is unknown, the card has no texts, the set is not on this machine, a row does not fit
            the card, or the number of rows differs from the card.
    """
    given = None if isinstance(card, Card) else python_object(str(card), split)
    if given is not None:
        title = row_name(str(card))
        rows, content = texts_of(given, title)
        return TextSet(title, split, rows, [f"{split}:{number}" for number in range(len(rows))], lambda: content)
    card = card if isinstance(card, Card) else load_card(card)
    source, base = found_copy(card, TextSource, split)
    return source.load(card, base, split)
