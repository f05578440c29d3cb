"""What a report shows, as data that every format renders."""

from __future__ import annotations

from dataclasses import dataclass

from vismt.report.tables import (
    Section,
    Table,
)


@dataclass(frozen=True)
class KeyFigure:
    """What a reader sees first: models with their number, and a sentence with measure, set, condition and n."""

    numbers: list[tuple[str, str]]
    about: str


@dataclass(frozen=True)
class Report:
    """Everything that all formats show, as plain texts that are not yet escaped."""

    title: str
    keys: list[KeyFigure]
    facts: list[tuple[str, str]]
    tables: list[Table]
    legend: str
    sections: list[Section]
    citation: list[str]
    config: str
