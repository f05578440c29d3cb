"""Histories of items and what came next, with the titles of the items, and candidates to choose the next one from.

A test row is the last item of a user and the one before it validates (leave-last-out, by time), or the split is that of the
files. Candidates are a function of the row's name and a seed: the same for every model, epoch and batch.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismt.data.cards import Card
from vismt.data.interaction_kind import SPLITS, InteractionsSource
from vismt.data.manifest import digest
from vismt.data.sources import fix, shown_path, verify_counts
from vismt.data.text_set import TextSet, read_text
from vismt.errors import UserError, near
from vismt.seeds import mix_seed

LINE_ENDS = re.compile("\r\n|\r|\n")


@dataclass(frozen=True)
class Catalogue:
    """The items of a set in the order of their file. ids: as the set has them; titles: as people know them."""

    ids: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Catalogue of {len(self):,} items"


@dataclass
class InteractionSet(TextSet):
    """One split. rows: {"history": numbers of items, the oldest first, "next": number, "catalogue": the items}."""

    catalogue: Catalogue = field(default_factory=Catalogue)


def files(source: InteractionsSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """Every file of the set, a group of its own."""
    names = [source.items, *source.files.values(), *([source.events] if source.events else [])]
    return {name: [(name, base / name)] if (base / name).is_file() else [] for name in dict.fromkeys(names)}


def load(card: Card, source: InteractionsSource, base: Path, split: str) -> InteractionSet:
    """The rows of `split` ("all" for every split) in the copy in the folder `base`."""
    catalogue = _catalogue(card, source, base)
    numbers = {name: number for number, name in enumerate(catalogue.ids)}
    names = list(source.splits) if split == "all" else [split]
    if source.events is not None:
        cut = _left_out(_events(card, source, base / source.events, numbers))
        parts = {name: cut[name] for name in names}
    else:
        parts = {name: _sequences(card, source, base / source.files[name], numbers) for name in names}
    kept = {
        name: [(row_id, history, target) for row_id, history, target in rows if len(history) >= source.shortest]
        for name, rows in parts.items()
    }
    verify_counts(card, source, base, {name: len(rows) for name, rows in kept.items()}, {})
    read = [source.items, *([source.events] if source.events else [source.files[name] for name in names])]
    hashed = [(name, base / name) for name in dict.fromkeys(read)]
    settings = repr((source.shortest, source.title, names))
    return InteractionSet(
        card.name,
        split,
        [{"history": h, "next": t, "catalogue": catalogue} for rows in kept.values() for _, h, t in rows],
        [f"{name}:{row_id}" for name, rows in kept.items() for row_id, _, _ in rows],
        lambda: f"{digest(hashed).sha256}:{settings}",
        shown_path(base),
        catalogue,
    )


def draw_candidates(
    catalogue: Catalogue, history: Sequence[int], target: int, count: int, name: str, seed: int = 0
) -> list[int]:
    """`count` items of different titles in an order by chance: the target once, none of the history.

    A function of the row's `name`, which tells users apart, and the seed. Raises UserError for a catalogue that is too small.
    """
    key = lambda number: " ".join(catalogue.titles[number].casefold().split())  # noqa: E731
    taken = {key(number) for number in (*history, target)}
    if count < 2 or count > len(catalogue) - len(taken):
        raise UserError(
            f"candidates: {count} of {len(catalogue):,} items for row '{name}', whose history has {len(taken) - 1}; "
            "take 2 or more, and fewer than are left."
        )
    found, turn = [target], 0
    while len(found) < count:
        if turn > 1000 * count:
            raise UserError(
                f"candidates: fewer than {count} titles that differ are left for row '{name}'; lower the number."
            )
        drawn = mix_seed(seed, "candidate", name, turn) % len(catalogue)
        turn += 1
        if key(drawn) not in taken:
            taken.add(key(drawn))
            found.append(drawn)
    return [found[i] for i in sorted(range(count), key=lambda place: mix_seed(seed, "place", name, place))]


def _catalogue(card: Card, source: InteractionsSource, base: Path) -> Catalogue:
    path = base / source.items
    text, shown = read_text(card, path, source.encoding), shown_path(path)
    if source.item_columns:
        pairs = _table(text, source.item_separator, source.item_columns, shown)
    else:
        lines = (
            (f"{shown}: line {number}", line) for number, line in enumerate(LINE_ENDS.split(text), 1) if line.strip()
        )
        pairs = ((where, list(line.partition(source.item_separator)[::2])) for where, line in lines)
    titles: dict[str, str] = {}
    for where, (name, title) in pairs:
        found = re.fullmatch(source.title, title.strip())
        known = found.group(1).strip() if found and found.group(1) else ""
        if not name or name in titles or not known:
            told = f"item '{name}' twice" if name in titles else f"no id and title ({title[:40]!r} of '{name}')"
            raise UserError(f"{where}: {told}; each item has one line, with '{source.item_separator}' between.")
        titles[name] = known
    return Catalogue(tuple(titles), tuple(titles.values()))


def _table(text: str, separator: str, columns: Sequence[str], shown: str) -> Iterator[tuple[str, list[str]]]:
    """(where, values of the columns) of each line after the first, which names the columns."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
    )
    head = next(reader, [])
    for column in columns:
        if column not in head:
            raise UserError(f"{shown}: has no column '{column}'.{near(column, head)}")
    places = [head.index(column) for column in columns]
    for row in reader:
        if row:
            if len(row) <= max(places):
                raise UserError(
                    f"{shown}: line {reader.line_num}: has {len(row)} fields, the first line names {len(head)}."
                )
            yield f"{shown}: line {reader.line_num}", [row[place] for place in places]


def _events(card: Card, source: InteractionsSource, path: Path, numbers: dict[str, int]) -> dict[str, list[int]]:
    """{user: items in their order of time}, an item that comes again left out; equal times in the order of the file."""
    found: dict[str, list[tuple[float, int]]] = {}
    text = read_text(card, path, source.encoding)
    for where, (user, item, time) in _table(text, source.separator, source.columns, shown_path(path)):
        try:
            when = float(time)
        except ValueError as error:
            raise UserError(f"{where}: time {time!r} is no number.") from error
        found.setdefault(user, []).append((when, _known(item, numbers, where)))
    ordered = {user: sorted(events, key=lambda event: event[0]) for user, events in found.items()}
    return {user: list(dict.fromkeys(item for _, item in events)) for user, events in ordered.items()}


def _left_out(users: dict[str, list[int]]) -> dict[str, list[tuple[str, list[int], int]]]:
    """{split: rows (name, history, next)} of the orders of all users."""
    found: dict[str, list[tuple[str, list[int], int]]] = {name: [] for name in SPLITS}
    for user, items in users.items():
        for place in range(1, len(items)):
            left = len(items) - 1 - place if len(items) > 2 else 2
            part = "test" if left == 0 else "validation" if left == 1 else "train"
            found[part].append((f"{user}:{place}", items[:place], items[place]))
    return found


def _sequences(
    card: Card, source: InteractionsSource, path: Path, numbers: dict[str, int]
) -> list[tuple[str, list[int], int]]:
    rows = []
    unpack = (lambda raw: _gunzip(card, raw, path)) if path.suffix == ".gz" else bytes
    for line_number, line in enumerate(LINE_ENDS.split(read_text(card, path, source.encoding, unpack)), 1):
        if not line.strip():
            continue
        where = f"{shown_path(path)}: line {line_number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: is no JSON ({error}).") from error
        history, target = (found.get(name) if isinstance(found, dict) else None for name in source.fields)
        if not isinstance(history, list) or target is None:
            raise UserError(f"{where}: is no object with {source.fields[0]}, a list, and {source.fields[1]}.")
        rows.append(
            (str(len(rows)), [_known(item, numbers, where) for item in history], _known(target, numbers, where))
        )
    return rows


def _gunzip(card: Card, raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{card.shown}: '{shown_path(path)}' is damaged: {error}. {fix(card)}") from error


def _known(item: Any, numbers: dict[str, int], where: str) -> int:
    if str(item) not in numbers:
        raise UserError(f"{where}: item '{item}' has no title in the file of items.")
    return numbers[str(item)]
