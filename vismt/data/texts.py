"""Rows of text from jsonl files, lines with separators and files of documents; the door to sets of texts.

Lines end with a line feed, a carriage return or both, also mixed in one file, and with nothing else (str.splitlines takes
more). Quotes are those around a whole field: in the wild half a file is quoted and the other half holds bare quotes, over
which a csv reader swallows lines.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vismt.data import interactions
from vismt.data.cards import Card, load_card
from vismt.data.interaction_kind import InteractionsSource
from vismt.data.manifest import digest
from vismt.data.source_types import TEXTS, Source
from vismt.data.sources import fix, not_found, place, shown_path, verify_counts
from vismt.data.text_kind import TextSource
from vismt.data.text_set import TextSet, read_text
from vismt.errors import UserError, near

__all__ = ["TextSet", "open_texts"]

LINE_ENDS = re.compile("\r\n|\r|\n")


def open_texts(card: Card | str | Path, split: str = "all", *, root: Path | None = None) -> TextSet:
    """The rows of `split` ('all' = every split) from the first of the card's sources that is here and has that split.

    Raises UserError for an unknown card or split, a card without texts, a set that is not here, rows that the card does not
    describe and a count of rows that differs from the card's.
    """
    card = card if isinstance(card, Card) else load_card(card)
    if not card.textual:
        raise UserError(f"{card.shown}: is no set of texts; name a card of kind text or interactions.")
    if split != "all" and split not in card.splits:
        raise UserError(f"{card.shown}: no split '{split}'.{near(split, dict.fromkeys([*card.splits, 'all']))}")
    for source in card.sources:
        base = place(card, source, root)
        if base is not None and isinstance(source, TEXTS) and (split == "all" or split in source.splits):
            return load(card, source, base, split)
    raise not_found(card, split, root)


def files(source: TextSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The file of each split, a group of its own."""
    return {
        name: [(name, base / name)] if (base / name).is_file() else [] for name in dict.fromkeys(source.files.values())
    }


def load(card: Card, source: Source, base: Path, split: str) -> TextSet:
    """The rows of `split` in the copy in the folder `base`, by the reader of its kind."""
    if isinstance(source, InteractionsSource):
        return interactions.load(card, source, base, split)
    names = list(source.splits) if split == "all" else [split]
    parts = {name: _read(card, source, base / source.files[name]) for name in names}
    verify_counts(card, source, base, {name: len(rows) for name, rows in parts.items()}, {})
    kept = [(source.files[name], base / source.files[name]) for name in names]
    settings = repr((source.form, source.fields, source.separators, source.starts, source.extract, source.encoding))
    return TextSet(
        card.name,
        split,
        [row for rows in parts.values() for row in rows],
        [f"{name}:{number}" for name, rows in parts.items() for number in range(len(rows))],
        lambda: f"{digest(kept).sha256}:{settings}",
        shown_path(base),
    )


def _read(card: Card, source: TextSource, path: Path) -> list[dict[str, Any]]:
    shown = shown_path(path)
    text = read_text(card, path, source.encoding)
    if source.form == "documents":
        starts = [found.start() for found in re.finditer(source.starts or "", text)]
        if not starts or text[: starts[0]].strip():
            raise UserError(f"{shown}: no document starts at the beginning ('{source.starts}'). {fix(card)}")
        rows = [{source.fields[0]: text[a:b].strip()} for a, b in zip(starts, [*starts[1:], len(text)])]
        return [_extracted(source, row, f"{shown}: document {number}") for number, row in enumerate(rows, 1)]
    parse = _object if source.form == "jsonl" else _fields
    lines = enumerate(LINE_ENDS.split(text), 1)
    return [
        _extracted(source, parse(source, line, f"{shown}: line {number}"), f"{shown}: line {number}")
        for number, line in lines
        if line.strip()
    ]


def _object(source: TextSource, line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is no JSON ({error}).") from error
    if not isinstance(found, dict) or not set(source.fields) <= set(found):
        raise UserError(f"{where}: is no object with {', '.join(source.fields)}.")
    return {name: found[name] for name in source.fields}


def _fields(source: TextSource, line: str, where: str) -> dict[str, Any]:
    values, rest = [], line
    for separator in source.separators:
        value, found, rest = rest.partition(separator)
        if not found:
            raise UserError(
                f"{where}: has no {separator!r} after '{value[:40]}'; it must hold {', '.join(source.fields)}."
            )
        values.append(value)
    values.append(rest)
    if any(separator in values[-1] for separator in set(source.separators) if separator == "\t"):
        raise UserError(f"{where}: has more than the fields {', '.join(source.fields)}.")
    return {name: _unquoted(value) for name, value in zip(source.fields, values)}


def _unquoted(value: str) -> str:
    whole = len(value) > 1 and value[0] == value[-1] == '"'
    return (value[1:-1].replace('""', '"') if whole else value).strip()


def _extracted(source: TextSource, row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with the groups of `extract` as further fields."""
    for name, pattern in source.extract.items():
        found = re.fullmatch(pattern, str(row[name]))
        if found is None:
            raise UserError(f"{where}: '{name}' ({str(row[name])[:60]!r}) does not fit the card's pattern '{pattern}'.")
        row = {**row, **{group: value for group, value in found.groupdict().items() if value is not None}}
    return row
