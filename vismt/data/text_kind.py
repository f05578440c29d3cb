"""What a card says of a set of texts, and which of it goes together (its reader is texts.py)."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from vismt.errors import UserError, near

FORMS = ("jsonl", "lines", "documents")


@dataclass(frozen=True)
class TextSource:
    """Rows of text: `files` maps each split to its file, in the `encoding`.

    `form` jsonl: an object a line, which must have the `fields`. lines: the `fields` of a line, between the `separators` (one
    less, taken in turn from the left); quotes around a whole field are taken off. documents: the one field holds all from one
    match of the regular expression `starts` to the next.
    `extract` maps a field to a regular expression that must fit all of its text: the named groups are fields, too, where they
    take part in the match.
    """

    root: str
    files: dict[str, str]
    splits: dict[str, int | None]
    fields: list[str]
    form: str = "jsonl"
    separators: list[str] = field(default_factory=list)
    starts: str | None = None
    extract: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    classes: int | None = None
    manifest: str | None = None
    kind: str = "text"


def check_texts(source: TextSource, shown: str) -> None:
    """UserError for settings that do not go together."""
    if source.form not in FORMS:
        raise UserError(f"{shown}: form '{source.form}' is not known.{near(source.form, FORMS)}")
    if set(source.files) != set(source.splits):
        names = f"'files' names {sorted(source.files)}, 'splits' names {sorted(source.splits)}"
        raise UserError(f"{shown}: {names}; they must agree.")
    wanted = {"jsonl": 0, "lines": len(source.fields) - 1, "documents": 0}[source.form]
    if (
        not 0 < len(set(source.fields)) == len(source.fields)
        or len(source.separators) != wanted
        or "" in source.separators
    ):
        raise UserError(
            f"{shown}: fields {source.fields} of form '{source.form}' need {wanted} separators and no name twice."
        )
    if (source.form == "documents") != (source.starts is not None) or (
        source.starts is not None and len(source.fields) > 1
    ):
        raise UserError(f"{shown}: 'starts' and one field are for form 'documents', and it needs them.")
    for key, pattern in {**source.extract, **({"starts": source.starts} if source.starts else {})}.items():
        try:
            named = re.compile(pattern).groupindex
        except re.error as error:
            raise UserError(f"{shown}: {key}: '{pattern}' is no regular expression: {error}.") from error
        if key != "starts" and (key not in source.fields or not named or set(named) & set(source.fields)):
            raise UserError(f"{shown}: extract: '{key}' must be a field and its groups named like no other field.")
    try:
        codecs.lookup(source.encoding)
    except LookupError as error:
        raise UserError(f"{shown}: encoding '{source.encoding}' is not known.") from error
