"""Entries of a configuration that name a set: 'card' or 'card:split', where the card may be a path or a Python object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vismt.errors import UserError
from vismt.objects import is_object, title_of
from vismt.plain_yaml import read_yaml

CARDS = (".yaml", ".yml")
FILES = (".csv", ".tsv", ".jsonl", *CARDS)  # of cards and of sets in one file


def card_and_split(entry: str) -> tuple[str, str]:
    """Return the card and the split of an entry; "all" where it names no split."""
    if is_object(entry) or Path(entry).exists():
        return entry, "all"
    card, colon, split = entry.rpartition(":")
    return (card, split or "all") if colon else (entry, "all")


def overlap(first: str, second: str) -> bool:
    """Return whether two sets, 'card' or 'card:split', have examples in common."""
    first_card, first_split = card_and_split(first)
    second_card, second_split = card_and_split(second)
    return first_card == second_card and (first_split == second_split or "all" in (first_split, second_split))


def row_name(entry: str) -> str:
    """Return an entry as rows of results name it: a card in a file by its name, other paths and objects by their last part."""
    if is_object(entry):
        return title_of(entry)
    card, split = card_and_split(entry)
    path = Path(card)
    if len(path.parts) < 2 and path.suffix not in FILES:
        return entry
    file = path / "card.yaml" if (path / "card.yaml").is_file() else path
    if file.is_file() and file.suffix in CARDS:
        name = str(read_yaml(file, card).get("name", file.stem))
    else:  # also a set that is on another machine
        name = path.stem if path.suffix in FILES else path.name
    return name if split == "all" else f"{name}:{split}"


def shown_name(entry: str) -> str:
    """Return the name of an entry in rows of results and in names of files, without ':' and '/'."""
    return row_name(entry).replace(":", "-").replace("/", "-")


def check_row_names(entries: Iterable[str], key: str) -> None:
    """Raise UserError where two different entries have one name in rows of results; key: of the entries."""
    seen: dict[str, str] = {}
    for entry in entries:
        other = seen.setdefault(row_name(entry), entry)
        if other != entry:
            raise UserError(
                f"{key}: '{other}' and '{entry}' are both called '{row_name(entry)}' in results; rename one, or give objects as "
                "{name: object}."
            )


def check_outside(entries: Sequence[str], inside: Mapping[str, Iterable[str]], key: str) -> None:
    """Raise UserError where two entries have one name, or one shares images with the sets of `inside`, {owner: entries}."""
    check_row_names(entries, key)
    for owner, sets in inside.items():
        for entry in entries:
            shared = next((name for name in sets if overlap(entry, name)), None)
            if shared is not None:
                raise UserError(f"{key}: '{entry}' shares images with '{shared}' of {owner}; name another set.")
