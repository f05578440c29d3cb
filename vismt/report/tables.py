"""Comparisons as the texts of a report's tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vismt.report.comparison import Cell, Comparison
from vismt.report.results import Result
from vismt.stats import LOWER, SHARE

MARKS = {"best": "★", "tie": "≈", "": ""}
# From so many arms on, a table is laid out for them; from so many corruptions on, they have a table of their own.
MANY_ARMS, MANY_CORRUPTIONS = 5, 4


@dataclass(frozen=True)
class Table:
    """Texts of one table: `heads`, then rows of as many texts; `best` are the (row, column) of the best numbers.

    The first `texts` columns are not numbers. many: the columns are too many for their usual width. folded: shown on
    request.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    texts: int = 2
    many: bool = False
    folded: bool = False


def split_corruptions(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Return (the others, corruptions); the second is empty where they are few enough to stand with the attacks."""
    corrupted = [c for c in comparisons if c.row.kind == "corruption"]
    if len({c.condition for c in corrupted}) < MANY_CORRUPTIONS:
        return list(comparisons), []
    return [c for c in comparisons if c.row.kind != "corruption"], corrupted


def result_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Return a table for each block with a row for each set and condition; many corruptions have one of their own."""
    several = len({c.row.task for c in comparisons}) > 1
    tables = []
    for _, group in groupby(comparisons, key=lambda c: c.block):
        kept = list(group)
        row = kept[0].row
        title = f"{row.task}: {row.protocol}" if several else row.protocol
        score = f", {scale_text(row.metric, row.scale)}"
        if row.better == LOWER:
            score += ", lower is better"
        plain, corrupted = split_corruptions(kept)
        if plain:
            tables.append(_table(title + score, plain))
        if corrupted:
            tables.append(_table(f"{title}, corruptions{score}", corrupted, folded=True))
    return tables


def _table(title: str, group: Sequence[Comparison], folded: bool = False) -> Table:
    arms = list(dict.fromkeys(arm for c in group for arm in c.cells))
    differences = ["Difference"] if any(c.difference for c in group) else []
    heads = ["Data", "Condition", *arms, *differences, f"n ({group[0].row.unit})"]
    rows, best = [], set()
    for number, c in enumerate(group):
        note = "" if c.paired or len(c.cells) < 2 else " (unpaired)"
        texts = [c.data, c.condition + note, *(cell_text(c.cells.get(arm), c.row) for arm in arms)]
        best |= {(number, 2 + i) for i, arm in enumerate(arms) if arm in c.cells and c.cells[arm].mark == "best"}
        if differences:
            texts.append(difference_text(c))
        rows.append([*texts, " / ".join(f"{n:,}" for n in dict.fromkeys(cell.n for cell in c.cells.values()))])
    return Table(title, heads, rows, best, many=len(arms) >= MANY_ARMS, folded=folded)


def turned(table: Table, conditions: int = 6) -> list[Table]:
    """Return a table for each set and each few conditions, a row for each column of `table` but the last, now in the title."""
    tables = []
    for data, group in groupby(range(len(table.rows)), key=lambda number: table.rows[number][0]):
        numbers = list(group)
        for start in range(0, len(numbers), conditions):
            chosen = numbers[start : start + conditions]
            counts = " / ".join(dict.fromkeys(table.rows[number][-1] for number in chosen))
            rows = [
                [head, *(table.rows[number][column] for number in chosen)]
                for column, head in enumerate(table.heads[:-1])
                if column > 1
            ]
            best = {
                (column - 2, 1 + place)
                for place, number in enumerate(chosen)
                for row, column in table.best
                if row == number
            }
            heads = [f"{data}, {table.heads[-1].replace('(', '= ' + counts + ' ').rstrip(')')}"]
            tables.append(
                Table(table.title, [*heads, *(table.rows[number][1] for number in chosen)], rows, best, texts=1)
            )
    return tables


def cell_text(cell: Cell | None, row: Result) -> str:
    """Return mean, half width and mark; a dash for no cell."""
    if cell is None:
        return "–"
    return f"{interval_text(cell.value, cell.half, row.scale)} {MARKS[cell.mark]}".rstrip()


def difference_text(c: Comparison) -> str:
    """Return the difference and its interval; a dash for none."""
    if c.difference is None:
        return "–"
    middle, low, high = (number_text(value, c.row.scale, sign=True) for value in c.difference)
    return f"{middle} [{low}, {high}]"


def interval_text(mean: float, half: float, scale: str, sign: bool = False) -> str:
    """Return mean ± half width: shares in per cent with one digit, other numbers as exact as two digits of the width."""
    if scale == SHARE or not half:
        return f"{number_text(mean, scale, sign)} ± {number_text(half, scale)}"
    digits = max(1, 1 - math.floor(math.log10(half)))
    plus = "+" if sign else ""
    return _minus(f"{mean:{plus}.{digits}f}") + f" ± {half:.{digits}f}"


def number_text(value: float, scale: str, sign: bool = False) -> str:
    """Return a share in per cent with one digit, any other number with four."""
    plus = "+" if sign else ""
    return _minus(f"{100 * value:{plus}.1f}" if scale == SHARE else f"{value:{plus}.4g}")


def _minus(text: str) -> str:
    """Return a number's text with a typographic minus."""
    return text.replace("-", "−", 1) if text.startswith("-") else text


def scale_text(metric: str, scale: str, better: str | None = None) -> str:
    """Return a metric as `number_text` shows it; with `better` an arrow to where it is better."""
    text = f"{metric} in %" if scale == SHARE else metric
    if better is None:
        return text
    return f"{text} {'↓' if better == LOWER else '↑'}"
