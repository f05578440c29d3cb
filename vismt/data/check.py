"""Checks of data sets: `check` compares counts and hashes with the card, `record` writes the hashes, `prepare` downloads.

`listing` lists all sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.cards import Card, list_cards, load_card
from vismt.data.copies import (
    digest_files,
    find_copy,
    first_copy,
    fix,
    not_found,
    read_manifest,
    shown_path,
    write_manifest,
)
from vismt.data.fetching import fetch, has_leftovers
from vismt.data.source_types import DataSource, Files

NOWHERE = "-"  # place of a set without a copy
_LISTED = 8  # number of wrong rows that a report names


class CheckRow(NamedTuple):
    """One split or group.

    state: "ok", "missing", "short", "changed" (other content or too many), "extra" (not recorded) or "damaged".
    """

    group: str
    expected: int | None
    actual: int
    state: str


@dataclass
class CheckReport:
    """Report of `check` on one copy.

    Attributes:
        where: Folder of the copy. None without a copy.
        splits: Rows, one for each split.
        groups: Rows, one for each group of the manifest.
        damaged: Rows, one for each example that cannot be decoded.
        problem: Reason why the set cannot be opened. "" if it can.
        fix: Instructions for getting the set.
        unit: Unit of the numbers.
    """

    name: str
    shown: str
    where: str | None
    classes: int
    splits: list[CheckRow]
    groups: list[CheckRow] = field(default_factory=list)
    damaged: list[CheckRow] = field(default_factory=list)
    problem: str = ""
    fix: str = ""
    unit: str = "images"

    @property
    def ok(self) -> bool:
        return not self.problem and all(row.state == "ok" for row in self.splits + self.groups + self.damaged)

    @property
    def images(self) -> int:
        return sum(row.actual for row in self.splits)

    def __str__(self) -> str:
        if self.ok:
            classes = f"{self.classes} classes, " if self.classes else ""
            hashes = "1 hash agrees" if len(self.groups) == 1 else f"{len(self.groups)} hashes agree"
            hashes = hashes if self.groups else "no hashes recorded"
            return f"{self.shown}: ok: {self.images:,} {self.unit}, {classes}{hashes}, under {self.where}"
        wrong = [row for row in self.groups + self.damaged if row.state != "ok"]
        if self.where is None or (self.problem and not wrong):
            return self.problem
        wrong = wrong or [row for row in self.splits if row.state != "ok"]
        expected = sum(row.expected or 0 for row in self.splits)
        count = f"{self.images:,} of {expected:,}" if expected else f"{self.images:,}"
        listed = []
        for row in wrong[:_LISTED]:
            counts = f" ({row.actual} of {row.expected})" if row.state == "short" else ""
            listed.append(f"{row.state} '{row.group}'{counts}")
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        return f"{self.shown}: {count} {self.unit} found under {self.where}; {', '.join(listed)}{more}. {self.fix}"


def _state(expected: int | None, count: int) -> str:
    if expected is None or count == expected:
        return "ok"
    if count == 0:
        return "missing"
    return "short" if count < expected else "changed"


def _check_hashes(card: Card, source: DataSource, files: Files) -> list[CheckRow]:
    """Return a row for each group of files that the manifest records or the copy has. Without a manifest there are none."""
    recorded = read_manifest(card, source)
    if not recorded:
        return []
    rows = []
    for name in console.track(sorted(recorded.keys() | files.keys()), "check", f"{card.name}: hashing"):
        count = len(files.get(name, ()))
        if name not in recorded:
            rows.append(CheckRow(name, 0, count, "extra"))
            continue
        state = _state(recorded[name].count, count)
        if state == "ok" and digest_files(files[name]) != recorded[name]:
            state = "changed"
        rows.append(CheckRow(name, recorded[name].count, count, state))
    return rows


def check_source(card: Card, source: DataSource, base: Path, *, decode: bool = True) -> CheckReport:
    """Return the report on the copy of `source` in the folder `base`.

    decode: See `check`.
    """
    splits, damaged, problem = [], [], ""
    for split, expected in source.splits.items():
        try:
            loaded = source.load(card, base, split)
            count = len(loaded.ids)
        except UserError as error:
            problem = problem or str(error)
            count = source.count_images(base, split)
        else:
            read: Any = getattr(loaded, "read", None) if decode else None  # texts were decoded when they were loaded
            for i in console.track(range(count), "check", f"{card.name}: decoding") if read else ():
                try:
                    read(i)
                except UserError:
                    damaged.append(CheckRow(loaded.ids[i], 1, 0, "damaged"))
        splits.append(CheckRow(split, expected, count, _state(expected, count)))
    return CheckReport(
        name=card.name,
        shown=card.shown,
        where=shown_path(base),
        classes=source.classes or card.classes,
        splits=splits,
        groups=_check_hashes(card, source, source.list_files(base)),
        damaged=damaged,
        problem=problem,
        fix=fix(card),
        unit=source.unit,
    )


def check(name: str | Path, *, decode: bool = True) -> CheckReport:
    """Return the report on the first copy of a set that is on this machine. Without a copy it has `missing` rows.

    decode: Whether to decode every image and map too, which finds truncated and empty files in sets without hashes.
    """
    card = load_card(name)
    copy = first_copy(card, card.sources)
    if copy is not None:
        return check_source(card, *copy, decode=decode)
    rows = [CheckRow(split, count, 0, "missing") for split, count in card.sources[0].splits.items()]
    problem = str(not_found(card, "all"))
    return CheckReport(card.name, card.shown, None, card.classes, rows, problem=problem, fix=fix(card))


def record(name: str | Path) -> str:
    """Write the hashes of the first copy of a set to the manifest that its card names. Return a line on what was done."""
    card = load_card(name)
    copy = first_copy(card, card.sources)
    if copy is None:
        raise not_found(card, "all")
    source, base = copy
    files = source.list_files(base)
    if source.manifest is None or not files:
        lack = "has no files to hash" if source.manifest else "names no manifest, or has a copy of a part"
        raise UserError(
            f"{card.shown}: its source {lack}; write `manifest: manifest.json` there, and record a whole copy."
        )
    write_manifest(card.path.parent / source.manifest, files)
    return f"{card.shown}: {len(files)} hashes of the copy under {shown_path(base)} are in {source.manifest}"


def prepare(name: str | Path, *, decode: bool = True) -> CheckReport:
    """Download what a set lacks, through torchvision or from a wheel, and return the report on it.

    A complete set is left as it is. A set that cannot be downloaded is checked where it is. If it is not on this machine,
    UserError gives the steps from the card.

    decode: See `check`.
    """
    card = load_card(name)
    source = next((source for source in card.sources if source.downloadable), None)
    if source is None:
        report = check(name, decode=decode)
        if report.where is None:
            steps = " ".join(card.how_to_get.split()) or f"See {card.shown}/{card.path.name}."
            raise UserError(f"{card.shown}: cannot be downloaded by vismt. {steps}")
        return report
    base = find_copy(card, source) or source.candidates(card)[-1]
    found = check_source(card, source, base, decode=decode) if base.exists() else None
    if found is None or not found.ok or has_leftovers(base):
        fetch(card, source, base, lambda: base.exists() and check_source(card, source, base, decode=decode).ok)
        found = check_source(card, source, base, decode=decode)
    return found


class ListingRow(NamedTuple):
    """A line of `vismt data list`. Images and classes are counted in the first copy, or taken from the card."""

    name: str
    kind: str
    images: int | None
    classes: int
    where: str


def listing() -> list[ListingRow]:
    """Return one row for each card that comes with the package. `where` is the folder of its first copy, or NOWHERE."""
    rows = []
    for name in list_cards():
        card = load_card(name)
        source, base = first_copy(card, card.sources) or (card.sources[0], None)
        counts = [count for count in source.splits.values() if count is not None]
        total = sum(counts) if len(counts) == len(source.splits) else None
        where = NOWHERE if base is None else shown_path(base)
        rows.append(ListingRow(name, source.kind, total, source.classes or card.classes, where))
    return rows
