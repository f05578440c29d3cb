"""What a report shows, as data that every format renders, and the texts of its tables, which are made from comparisons."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vismt.report.comparison import Cell, Comparison
from vismt.report.results import ROUNDING, Result
from vismt.uncertainty.intervals import LOWER, SHARE

MARKS = {"best": "★", "tie": "≈", "": ""}
# From so many arms on, arms are rows; from so many corruptions on, these have a table of their own.
MANY_ARMS, MANY_CORRUPTIONS = 5, 4
# Characters that a page has room for, those that the space between two columns takes, and those of a text that may be broken.
WIDEST, APART, TEXT = 128, 4, 26


@dataclass(frozen=True)
class Table:
    """Texts of one table: `heads`, then rows of as many texts; `best` are the (row, column) of the best numbers.

    The first `texts` columns are not numbers. folded: shown on request.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    texts: int = 2
    folded: bool = False


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


def split_corruptions(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Return (the others, corruptions); the second is empty where they are few enough to stand with the attacks."""
    corrupted = [c for c in comparisons if c.row.kind == "corruption"]
    if len({c.condition for c in corrupted}) < MANY_CORRUPTIONS:
        return list(comparisons), []
    return [c for c in comparisons if c.row.kind != "corruption"], corrupted


def result_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Return the tables of results, one for each protocol and its conditions; many corruptions have one of their own.

    Of one measure of few arms, arms are columns and sets and conditions rows. Otherwise arms are rows and measures columns.
    """
    tables = []
    for group in _groups(comparisons):
        arms = {arm for c in group for arm in c.cells}
        for kept, folded in zip(split_corruptions(group), (False, True), strict=True):
            if not kept:
                continue
            title = _title(kept, comparisons, ", corruptions" if folded else "")
            if len({c.block for c in kept}) == 1 and (folded or len(arms) < MANY_ARMS):
                tables.append(_arms_across(title, kept, folded))
            else:
                tables.append(_arms_down(title, kept, folded))
    return tables


def paper_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Return the tables of results with arms as rows, and with measures or sets as columns, as papers print them."""
    return [_arms_down(_title(group, comparisons), group) for group in _groups(comparisons)]


def _groups(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Return the comparisons of each protocol in their order; measures without a common condition are groups of their own."""
    measures: dict[tuple[str, ...], list[Comparison]] = {}
    for c in comparisons:
        measures.setdefault(c.block, []).append(c)
    groups: list[list[Comparison]] = []
    for measure in measures.values():
        for group in groups:
            alike = (group[0].row.protocol, group[0].row.unit) == (measure[0].row.protocol, measure[0].row.unit)
            if alike and {c.condition for c in group} & {c.condition for c in measure}:
                group += measure
                break
        else:
            groups.append(measure)
    return groups


def _title(group: Sequence[Comparison], comparisons: Sequence[Comparison], more: str = "") -> str:
    """Return the protocol of a table, its task where the report has several, and its measure where it has one."""
    row = group[0].row
    tasks = {c.row.task for c in group}
    title = f"{row.protocol}{more}"
    if len(tasks) == 1 < len({c.row.task for c in comparisons}):
        title = f"{row.task}: {title}"
    if len({c.row.metric for c in group}) > 1 or len(tasks) > 1:
        return title
    return f"{title}, {scale_text(row.metric, row.scale)}" + (", lower is better" if row.better == LOWER else "")


def _arms_across(title: str, group: Sequence[Comparison], folded: bool) -> Table:
    """Return a row for each set and condition and a column for each arm."""
    arms = list(dict.fromkeys(arm for c in group for arm in c.cells))
    conditions = ["Condition"] if {c.condition for c in group} != {"clean"} else []
    differences = ["Difference"] if any(c.difference for c in group) else []
    heads = ["Data", *conditions, *arms, *differences, f"n ({group[0].row.unit})"]
    first = 1 + len(conditions)
    rows, best = [], set()
    for number, c in enumerate(group):
        texts = [c.data, *([c.condition] if conditions else [])]
        texts[-1] += "" if c.paired or len(c.cells) < 2 else " (unpaired)"
        texts += [cell_text(c.cells.get(arm), c.row) for arm in arms]
        best |= {(number, first + i) for i, arm in enumerate(arms) if _is_best(c, arm)}
        if differences:
            texts.append(difference_text(c))
        rows.append([*texts, counts_text([c])])
    return Table(title, heads, rows, best, texts=first, folded=folded)


def _arms_down(title: str, group: Sequence[Comparison], folded: bool = False) -> Table:
    """Return a row for each arm under each set and condition, and a column for each measure.

    Of one measure the sets are columns, and of one measure on one set the conditions are.
    """
    arms = list(dict.fromkeys(arm for c in group for arm in c.cells))
    tasks, sets = {c.row.task for c in group}, list(dict.fromkeys(c.data for c in group))
    measures = {(c.row.task, c.row.metric) for c in group}

    def place(c: Comparison) -> tuple[tuple[str, str], str]:
        """Return the band (set, condition) and the column of a comparison."""
        if len(measures) > 1:
            measure = scale_text(c.row.metric, c.row.scale, c.row.better)
            return (c.data, c.condition), f"{c.row.task} {measure}" if len(tasks) > 1 else measure
        return (("", c.condition), c.data) if len(sets) > 1 else (("", ""), c.condition)

    table = {place(c): c for c in group}
    columns = list(dict.fromkeys(column for _, column in table))
    bands = list(dict.fromkeys(band for band, _ in table))
    shown = [at for at in range(2) if len({band[at] for band in bands}) > 1]
    heads, counts = _heads([[c for (_, name), c in table.items() if name == column] for column in columns], columns)
    title += f", {sets[0]}" if len(sets) == 1 else ""
    title += f", n = {counts} {group[0].row.unit}" if counts else ""
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for band in bands:
        in_band = [table.get((band, column)) for column in columns]
        first = [band[at] for at in shown]
        for arm in arms:
            if any(c is not None and arm in c.cells for c in in_band):
                best |= {(len(rows), len(shown) + 1 + i) for i, c in enumerate(in_band) if c and _is_best(c, arm)}
                rows.append([*first, arm, *("–" if c is None else cell_text(c.cells.get(arm), c.row) for c in in_band)])
        if len(arms) == 2 and any(c is not None and c.difference for c in in_band):
            differences = ["–" if c is None else difference_text(c) for c in in_band]
            rows.append([*first, f"{arms[1]} − {arms[0]}", *differences])
    names = [("Data", "Condition")[at] for at in shown]
    return Table(title, [*names, "Arm", *heads], rows, best, texts=len(shown) + 1, folded=folded)


def _heads(columns: Sequence[Sequence[Comparison]], names: Sequence[str]) -> tuple[list[str], str]:
    """Return the heads of columns of numbers, and the n that all have, "" where it differs and is in the heads.

    A head also tells that a comparison in its column is not paired.
    """
    counts = [counts_text(of_column) for of_column in columns]
    same = counts[0] if len(set(counts)) == 1 else ""
    heads = []
    for of_column, name, count in zip(columns, names, counts, strict=True):
        unpaired = any(not c.paired and len(c.cells) > 1 for c in of_column)
        heads.append(name + ("" if same else f", n = {count}") + (" (unpaired)" if unpaired else ""))
    return heads, same


def counts_text(comparisons: Sequence[Comparison]) -> str:
    """Return the numbers of examples of some comparisons, "50 / 60" where they differ."""
    return " / ".join(f"{n:,}" for n in dict.fromkeys(cell.n for c in comparisons for cell in c.cells.values()))


def _is_best(c: Comparison, arm: str) -> bool:
    return arm in c.cells and c.cells[arm].mark == "best"


def fitted(table: Table, widest: int = WIDEST) -> list[Table]:
    """Return a table as several with the same first columns where its numbers take more than `widest` characters."""
    widths = [_width(table, column) for column in range(len(table.heads))]
    first = sum(widths[: table.texts])
    groups: list[list[int]] = [[]]
    taken = first
    for column in range(table.texts, len(table.heads)):
        if groups[-1] and taken + widths[column] > widest:
            groups.append([])
            taken = first
        groups[-1].append(column)
        taken += widths[column]
    parts = []
    for group in groups:
        kept = [*range(table.texts), *group]
        rows = [[row[column] for column in kept] for row in table.rows]
        best = {(row, kept.index(column)) for row, column in table.best if column in kept}
        parts.append(replace(table, heads=[table.heads[column] for column in kept], rows=rows, best=best))
    return parts


def _width(table: Table, column: int) -> int:
    """Return the characters that a column needs: its head is broken between words and joints, and so are long texts."""
    words = max(len(word) for word in re.split(r"[\s+:_/-]", table.heads[column]))
    longest = max((len(row[column]) for row in table.rows), default=0)
    return APART + max(words, TEXT if is_long(table, column) else longest)


def is_text(table: Table, column: int) -> bool:
    """Return whether a column holds words and not numbers."""
    return column < table.texts or is_long(table, column)


def is_long(table: Table, column: int) -> bool:
    """Return whether a column holds texts that may be broken between lines."""
    most = TEXT if column < table.texts else 2 * TEXT
    return any(len(row[column]) > most for row in table.rows)


def cell_text(cell: Cell | None, row: Result) -> str:
    """Return mean, half width and mark; a dash for no cell."""
    if cell is None:
        return "–"
    return f"{interval_text(cell.value, cell.half, row.scale)} {MARKS[cell.mark]}".rstrip()


def difference_text(c: Comparison) -> str:
    """Return the difference and its interval; a dash for none."""
    return "–" if c.difference is None else bounds_text(c.difference, c.row.scale)


def bounds_text(difference: tuple[float, float, float], scale: str) -> str:
    """Return (difference, low, high) as "+1.2 [−0.3, +2.7]", as exact as the width allows."""
    _, low, high = difference
    middle, low_text, high_text = (number_text(value, scale, True, (high - low) / 2) for value in difference)
    return f"{middle} [{low_text}, {high_text}]"


def interval_text(mean: float, half: float, scale: str, sign: bool = False) -> str:
    """Return mean ± half width, both as exact as the width allows."""
    return f"{number_text(mean, scale, sign, half)} ± {number_text(half, scale, half=half)}"


def number_text(value: float, scale: str, sign: bool = False, half: float = 0.0) -> str:
    """Return a number as exact as two digits of the half width of its interval, a share in per cent.

    A share has one digit at least, and no more where its width has a digit then. Without a width a share has one digit, any
    other number four in all.
    """
    shown, width = (100 * value, 100 * half) if scale == SHARE else (value, half)
    if width <= ROUNDING * max(1, abs(shown)):
        width = 0.0
    exponent = math.floor(math.log10(width)) if width > 0 else 0
    digits = f".{max(0, 1 - exponent)}f" if width > 0 else ".4g"
    if scale == SHARE:
        digits = f".{1 if exponent >= -1 else 1 - exponent}f"
    return typographic(format(shown, f"+{digits}" if sign else digits))


def typographic(text: str) -> str:
    """Return a number's text with a typographic minus, and without a sign where it is zero."""
    if not text.strip("+-0."):
        return text.lstrip("+-")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def scale_text(metric: str, scale: str, better: str | None = None) -> str:
    """Return a metric as `number_text` shows it; with `better` an arrow to where it is better."""
    text = f"{metric} in %" if scale == SHARE else metric
    if better is None:
        return text
    return f"{text} {'↓' if better == LOWER else '↑'}"
