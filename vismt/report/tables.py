"""Comparisons as the texts of a report's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vismt.report.comparison import Cell, Comparison, is_share
from vismt.robustness.conditions import corruption

MARKS = {"best": "★", "tie": "≈", "": ""}
# From so many models on, a table is laid out for them; from so many corruptions on, they have a table of their own.
MANY_MODELS, MANY_CORRUPTIONS = 5, 4


@dataclass(frozen=True)
class Table:
    """Texts of one protocol: `heads`, then rows of as many texts; `best` are the (row, column) of the best numbers.

    The first `texts` columns are no numbers. many: the columns are too many to stand as they are. folded: shown when asked
    for.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    texts: int = 2
    many: bool = False
    folded: bool = False


def split_corruptions(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """(the others, corruptions), the second empty where there are so few that they stand with the attacks."""
    corrupted = [c for c in comparisons if corruption(c.condition)]
    if len({c.condition for c in corrupted}) < MANY_CORRUPTIONS:
        return list(comparisons), []
    return [c for c in comparisons if not corruption(c.condition)], corrupted


def result_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """One table for each protocol, metric and seed, with a row for each set and condition; many corruptions apart."""
    seeds = {c.seed for c in comparisons}
    tables = []
    for (protocol, metric, seed, _), group in groupby(
        comparisons, key=lambda c: (c.protocol, c.metric, c.seed, c.unit)
    ):
        title = protocol + (f", seed {seed}" if len(seeds) > 1 else "")
        unit = f", {metric} in %" if is_share(metric) else f", {metric}"
        kept = list(group)
        unit += ", lower is better" if kept[0].lower_is_better else ""
        plain, corrupted = split_corruptions(kept)
        tables += [_table(title + unit, plain)] if plain else []
        tables += [_table(f"{title}, corruptions{unit}", corrupted, folded=True)] if corrupted else []
    return tables


def _table(title: str, group: Sequence[Comparison], folded: bool = False) -> Table:
    models = list(dict.fromkeys(model for c in group for model in c.cells))
    show_difference = any(c.difference for c in group)
    heads = ["Data", "Condition", *models, *["Difference"] * show_difference, f"n ({group[0].unit})"]
    rows, best = [], set()
    for number, c in enumerate(group):
        note = "" if c.paired or len(c.cells) < 2 else " (unpaired)"
        texts = [c.data, c.condition + note, *(cell_text(c.cells.get(model), c.metric) for model in models)]
        best |= {
            (number, 2 + i) for i, model in enumerate(models) if model in c.cells and c.cells[model].mark == "best"
        }
        texts += [difference_text(c)] * show_difference
        rows.append([*texts, " / ".join(f"{n:,}" for n in dict.fromkeys(cell.n for cell in c.cells.values()))])
    return Table(title, heads, rows, best, many=len(models) >= MANY_MODELS, folded=folded)


def turned(table: Table, conditions: int = 6) -> list[Table]:
    """A table for each set and each few conditions, a row for each column of `table` but the last, which the title tells."""
    found = []
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
            found.append(
                Table(table.title, [*heads, *(table.rows[number][1] for number in chosen)], rows, best, texts=1)
            )
    return found


def cell_text(cell: Cell | None, metric: str) -> str:
    """Mean, half width and mark; a dash for no cell."""
    if cell is None:
        return "–"
    return f"{number_text(cell.value, metric)} ± {number_text(cell.ci95, metric)} {MARKS[cell.mark]}".rstrip()


def difference_text(c: Comparison) -> str:
    """The difference and its interval; a dash for none."""
    if c.difference is None:
        return "–"
    middle, low, high = (number_text(value, c.metric, sign=True) for value in c.difference)
    return f"{middle} [{low}, {high}]"


def number_text(value: float, metric: str, sign: bool = False) -> str:
    """A share in per cent with one digit, any other value with four."""
    text = f"{100 * value:+.1f}" if is_share(metric) else f"{value:+.4g}"
    text = text.replace("-", "−", 1) if text.startswith("-") else text
    return text if sign else text.lstrip("+")


def scale_text(metric: str, lower_is_better: bool) -> str:
    """A metric as `number_text` shows it, with an arrow to where it is better."""
    return f"{metric}{' in %' * is_share(metric)} {'↓' if lower_is_better else '↑'}"
