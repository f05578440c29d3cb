"""Entries of a configuration that name a set: "card" or "card:split". The card may be a path or a Python object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path

from vismt.base.errors import UserError
from vismt.base.objects import is_object, title_of
from vismt.config.yaml_text import read_yaml
from vismt.storage.paths import file_name, shipped

CARDS = (".yaml", ".yml")
DELIMITERS = {".csv": ",", ".tsv": "\t"}  # text between the columns of a table by its suffix
FILES = (*DELIMITERS, ".jsonl", ".json", *CARDS)  # suffixes of cards and of sets in one file


def card_and_split(entry: str) -> tuple[str, str]:
    """Return the card and the split of an entry. The split is "all" if the entry names none."""
    if is_object(entry) or os.path.exists(entry):
        return entry, "all"
    card, colon, split = entry.rpartition(":")
    return (card, split or "all") if colon else (entry, "all")


def overlap(first: str, second: str) -> bool:
    """Return whether two sets, "card" or "card:split", have examples in common.

    A card is the same by its name and by any path to it, an object by its digest. A folder without a card contains the folders
    below it. A card whose `same_images_as` names another card has its images, in splits that do not correspond.
    """
    first_card, first_split = card_and_split(first)
    second_card, second_split = card_and_split(second)
    places = _place(first_card), _place(second_card)
    if places[0] == places[1]:
        return first_split == second_split or "all" in (first_split, second_split)
    if _published_as(places[0]) == _published_as(places[1]):
        return True
    pairs = ((places, first_split), (places[::-1], second_split))
    return any(outer in inner.parents and os.path.isdir(outer) and split == "all" for (outer, inner), split in pairs)


def _place(card: str) -> Path:
    """Return what a card is compared by: its file, or a folder or file without a card. Without either, return the text."""
    if is_object(card):
        return Path(card.rpartition(" ")[2])
    found = Path(card) if "/" in card else shipped("datasets") / card
    path = found if os.path.exists(found) else Path(card).expanduser()
    return (path / "card.yaml" if os.path.isfile(path / "card.yaml") else path).resolve()


@lru_cache
def _published_as(place: Path) -> Path:
    """Return the place of the card with the same images that `same_images_as` of a card names, else `place`."""
    if place.suffix not in CARDS or not os.path.isfile(place):
        return place
    named = read_yaml(place, str(place)).get("same_images_as")
    return _place(named) if isinstance(named, str) else place


def row_name(entry: str) -> str:
    """Return an entry as rows of results name it: a card in a file by its name, other paths and objects by their last part."""
    if is_object(entry):
        return title_of(entry)
    card, split = card_and_split(entry)
    path = Path(card)
    if "/" not in card and path.suffix not in FILES:
        return entry
    file = path / "card.yaml" if os.path.isfile(path / "card.yaml") else path
    if os.path.isfile(file) and file.suffix in CARDS:
        name = str(read_yaml(file, card).get("name", file.stem))
    else:  # also a set that is on another machine
        name = path.parent.name if path.name == "card.yaml" and path.parent.name else path.name
        name = Path(name).stem if Path(name).suffix in FILES else name
    return name if split == "all" else f"{name}:{split}"


def shown_name(entry: str) -> str:
    """Return the name of an entry in rows of results and in names of files, without ':' and '/'."""
    return row_name(entry).replace(":", "-").replace("/", "-")


def check_row_names(entries: Iterable[str], key: str) -> None:
    """Raise UserError if two different entries have one name in rows of results or their files.

    key: Key of the entries.
    """
    seen: dict[str, str] = {}
    for entry in entries:
        name = file_name(row_name(entry))
        other = seen.setdefault(name, entry)
        if other != entry:
            raise UserError(
                f"{key}: '{other}' and '{entry}' are both called '{name}' in results; rename one, or give objects as "
                "{name: object}."
            )


def check_apart(*stages: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError if sets of two stages, such as what trains, chooses and tests, share examples.

    stages: Entries by key. Entries of one stage may overlap.
    """
    for before, after in combinations(stages, 2):
        for (owner, others), (key, entries) in product(before.items(), after.items()):
            for entry, other in product(entries, others):
                if overlap(entry, other):
                    raise UserError(
                        f"{key} '{entry}' shares examples with {owner} '{other}'; name another set or split."
                    )
