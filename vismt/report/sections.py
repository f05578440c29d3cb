"""Sections of a report: titled groups of tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vismt.report.tables import Table


@dataclass(frozen=True)
class Picture:
    """A PNG inside the run folder, its title and its caption."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: its heading.
        tables: each with the note below it.
        pictures: shown after the tables.
        folded: whether the pictures after the first are shown on request only.
    """

    title: str
    tables: list[tuple[Table, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    folded: bool = False
