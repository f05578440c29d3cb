"""What a report shows, as data that every format renders, and the texts of its tables, which come from comparisons."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vismt.report.comparison import AVERAGE, MANY_CORRUPTIONS, Cell, Comparison, strongest_attack
from vismt.report.results import ROUNDING, Result
from vismt.uncertainty.intervals import HIGHER, LOWER, SHARE, Better, interval_kind_text, over_domains

MARKS = {"best": "★", "tie": "≈", "": ""}
SAMPLER_NOTE = (
    "The interval over episodes is the usual one in papers. It is smaller because it takes the episodes as independent, although "
    "they share their images: it leaves out that other images of the classes give another accuracy."
)
SCORE = " (score)"  # after the measure of a task that is compared, among all its measures
BIAS_NOTE = (
    " Bias-corrected: few examples make a calibration error too large. The interval is corrected for it, the value is not, and "
    "lies outside. It is not marked as the best."
)
MANY_ARMS = 5  # from so many arms on, arms are rows
MANY_ROWS = 40  # longer tables of measures are shown on request
# Numbers of characters that a page has room for, that the space between two columns takes, and of a text that may be broken.
_WIDEST, _APART, _TEXT = 128, 4, 26


@dataclass(frozen=True)
class Table:
    """Texts of one table: `heads`, then rows of as many texts. `best` holds the (row, column) of the best numbers.

    The first `texts` columns are not numbers. folded: Whether it is shown on request.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    texts: int = 2
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG inside the run folder, its title and its caption."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report, whose parts are shown in this order.

    Args:
        title: Heading.
        pairs: Names with a line about each.
        commands: Lines to paste into a shell.
        quotations: Sentences to cite.
        tables: Tables, each with the note below it.
        pictures: Pictures, side by side if there is room.
        folded: Whether the pictures after the first are shown on request only.
        files: Names and contents of files, which the page shows on request.
    """

    title: str
    tables: list[tuple[Table, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    folded: bool = False
    pairs: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    quotations: list[str] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Whether the section shows anything."""
        return any((self.tables, self.pictures, self.pairs, self.commands, self.quotations))


@dataclass(frozen=True)
class KeyFigure:
    """Models with their number, and a sentence with measure, set, condition and n."""

    numbers: list[tuple[str, str]]
    about: str


@dataclass(frozen=True)
class Report:
    """Everything that all formats show, as plain texts that are not yet escaped, in the order of a page.

    Args:
        title: Heading.
        answer: What follows from the numbers, "" without an answer.
        basis: What the answer follows from.
        keys: Most important numbers.
        sections: Parts. Empty parts are left out.
    """

    title: str
    answer: str = ""
    basis: str = ""
    keys: Sequence[KeyFigure] = ()
    sections: Sequence[Section] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", [section for section in self.sections if section.filled])


def split_corruptions(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Return (the other comparisons, corruptions).

    The second is empty if corruptions are few enough to stand with the attacks.
    """
    corrupted = [c for c in comparisons if c.row.kind == "corruption"]
    if len({c.condition for c in corrupted}) < MANY_CORRUPTIONS:
        return list(comparisons), []
    return [c for c in comparisons if c.row.kind != "corruption"], corrupted


def result_tables(comparisons: Sequence[Comparison]) -> list[tuple[Table, str]]:
    """Return the tables of results, one for each protocol and its conditions. Many corruptions have a table of their own.

    With one measure and few arms, arms are columns, and sets and conditions are rows. Otherwise arms are rows and measures are
    columns. The note of a table says what its intervals cover.
    """
    tables = []
    for group in _groups(comparisons):
        arms = {arm for c in group for arm in c.cells}
        for kept, folded in zip(split_corruptions(group), (False, True), strict=True):
            if not kept:
                continue
            title = _title(kept, comparisons, ", corruptions" if folded else "")
            across = len({c.block for c in kept}) == 1 and (folded or len(arms) < MANY_ARMS)
            table = _arms_across(title, kept, folded) if across else _arms_down(title, kept, folded)
            tables.append((table, _note(kept)))
    return tables


def measure_tables(comparisons: Sequence[Comparison]) -> list[tuple[Table, str]]:
    """Return for each task with further measures a table with a row for each of its measures, the score first."""
    tables = []
    for key in dict.fromkeys((c.row.task, c.row.protocol, c.row.unit) for c in comparisons if c.row.further):
        group = [c for c in comparisons if (c.row.task, c.row.protocol, c.row.unit) == key]
        group = split_corruptions(group)[0]
        table = _arms_across(_title(group, comparisons, ", all measures"), group, folded=False)
        kinds: dict[str, dict[str, None]] = {}
        for c in group:
            kinds.setdefault(kinds_text([c]), {})[c.row.metric] = None
        note = _note(group)
        if len({cell.covers for c in group for cell in c.cells.values()}) > 1:
            note = "; ".join(f"{', '.join(metrics)}: {kind}" for kind, metrics in kinds.items())
            note = f"± and [ ]: {note}. {SAMPLER_NOTE * any(c.row.interval == 'sampler' for c in group)}".rstrip()
        tables.append((replace(table, folded=len(table.rows) > MANY_ROWS), note))
    return tables


def difference_tables(comparisons: Sequence[Comparison]) -> list[tuple[Table, str]]:
    """Return the differences of every arm to the baseline, one table for each protocol, the strongest attack first."""
    tables = []
    for group in _groups([c for c in ranked(comparisons) if c.differences]):
        bases = {c.row.task: c.base for c in group}
        names = ", ".join(set(bases.values()) if len(set(bases.values())) == 1 else map(": ".join, bases.items()))
        title = f"Difference to {names}: {_title(group, comparisons)}"
        note = f"[ ]: {kinds_text(group)}, on the same examples.{_over_domains(group, differences=True)}"
        tables.append((_arms_down(title, group, differences=True), note))
    return tables


def ranked(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return comparisons under the strongest attack, then clean ones, then the others. Many corruptions are left out."""
    kept = split_corruptions(comparisons)[0]
    strongest = {c.block: strongest_attack([other for other in kept if other.block == c.block]) for c in kept}

    def rank(c: Comparison) -> int:
        return 0 if c.condition == strongest[c.block] else 1 if c.condition == "clean" else 2

    return sorted(kept, key=rank)


def paper_tables(comparisons: Sequence[Comparison]) -> list[tuple[Table, str]]:
    """Return the tables of results with arms as rows, and with measures or sets as columns, as papers print them."""
    groups = [(_arms_down(_title(group, comparisons), group), _note(group)) for group in _groups(comparisons)]
    return [*groups, *difference_tables(comparisons)]


def without_further(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of scores, without the further measures of their tasks."""
    return [c for c in comparisons if not c.row.further]


def _note(group: Sequence[Comparison]) -> str:
    outside = any(
        not cell.low - ROUNDING <= cell.value <= cell.high + ROUNDING for c in group for cell in c.cells.values()
    )
    return f"± and [ ]: {kinds_text(group)}.{_over_domains(group)}{BIAS_NOTE if outside else ''}"


def _over_domains(group: Sequence[Comparison], differences: bool = False) -> str:
    """Return the intervals of averages, or of their differences, that take their sets as a sample of sets."""
    texts = []
    for c in (c for c in group if c.data == AVERAGE):
        sets = [other for other in group if (other.block, other.condition) == (c.block, c.condition) and other != c]
        parts = []
        for arm in c.differences if differences else c.cells:
            steps = [of.cells[arm].value - (of.cells[c.base].value if differences else 0) for of in sets]
            sample = over_domains(steps)
            if sample is not None:
                ends = (number_text(end, c.row.scale, differences, sample.half) for end in sample.bounds)
                parts.append(f"{arm} [{', '.join(ends)}]")
        texts += [f"{c.condition}, {', '.join(parts)}"] if parts else []
    return f" Average, {interval_kind_text('domains')}: {'; '.join(texts)}." if texts else ""


def _groups(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Return the comparisons of each protocol in their order. Measures without a common condition are groups of their own."""
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
    """Return the protocol of a table, its task if the report has several, and its measure if it has one."""
    row = group[0].row
    tasks = {c.row.task for c in group}
    title = f"{row.protocol}{more}"
    if len(tasks) == 1 < len({c.row.task for c in comparisons}):
        title = f"{row.task}: {title}"
    if len({c.row.metric for c in group}) > 1 or len(tasks) > 1:
        return title
    return f"{title}, {scale_text(row.metric, row.scale)}" + (", lower is better" if row.better == LOWER else "")


def _arms_across(title: str, group: Sequence[Comparison], folded: bool) -> Table:
    """Return a row for each measure, set and condition and a column for each arm."""
    arms = list(dict.fromkeys(arm for c in group for arm in c.cells))
    sets, counts = {c.data for c in group}, {counts_text([c]) for c in group}
    measures = ["Measure"] if len({c.block for c in group}) > 1 else []
    conditions = ["Condition"] if {c.condition for c in group} != {"clean"} else []
    names = ["Data"] if len(sets) > 1 or not (conditions or measures) else []
    numbers = [f"n ({group[0].row.unit})"] if len(counts) > 1 else []
    title += "" if names else f", {group[0].data}"
    title += "" if numbers else f", n = {counts.pop()} {group[0].row.unit}"
    heads = [*measures, *names, *conditions, *arms, *numbers]
    first = len(measures) + len(names) + len(conditions)
    rows, best = [], set()
    for number, c in enumerate(group):
        measure = scale_text(c.row.metric, c.row.scale, c.row.better) + (SCORE if c.block == group[0].block else "")
        texts = [*([measure] if measures else []), *([c.data] if names else []), *([c.condition] if conditions else [])]
        texts[-1] += "" if c.paired or len(c.cells) < 2 else " (unpaired)"
        texts += [cell_text(c.cells.get(arm), c.row) for arm in arms]
        best |= {(number, first + i) for i, arm in enumerate(arms) if _is_best(c, arm)}
        rows.append([*texts, *([counts_text([c])] if numbers else [])])
    return Table(title, heads, rows, best, texts=first, folded=folded)


def _arms_down(title: str, group: Sequence[Comparison], folded: bool = False, differences: bool = False) -> Table:
    """Return a row for each arm under each set and condition, and a column for each measure.

    With one measure the sets are columns, and with one measure on one set the conditions are columns. differences: Whether to
    show differences to the baseline instead of the numbers.
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

    def text(c: Comparison | None, arm: str) -> str:
        if c is None:
            return "–"
        return difference_text(c, arm) if differences else cell_text(c.cells.get(arm), c.row)

    table = {place(c): c for c in group}
    columns = list(dict.fromkeys(column for _, column in table))
    bands = list(dict.fromkeys(band for band, _ in table))
    shown = [at for at in range(2) if len({band[at] for band in bands}) > 1]
    by_column = [[c for (_, name), c in table.items() if name == column] for column in columns]
    heads, counts = _heads(by_column, columns, differences=differences)
    title += f", {sets[0]}" if len(sets) == 1 else ""
    title += f", n = {counts} {group[0].row.unit}" if counts else ""
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for band in bands:
        in_band = [table.get((band, column)) for column in columns]
        first = [band[at] for at in shown]
        for arm in arms:
            texts = [text(c, arm) for c in in_band]
            if set(texts) != {"–"}:
                if not differences:
                    best |= {(len(rows), len(shown) + 1 + i) for i, c in enumerate(in_band) if c and _is_best(c, arm)}
                rows.append([*first, arm, *texts])
    names = [("Data", "Condition")[at] for at in shown]
    return Table(title, [*names, "Model", *heads], rows, best, texts=len(shown) + 1, folded=folded)


def _heads(
    columns: Sequence[Sequence[Comparison]], names: Sequence[str], *, differences: bool
) -> tuple[list[str], str]:
    """Return the heads of columns of numbers, and the n that all have. It is "" if n differs and is in the heads.

    A head is marked if a comparison in its column is not paired. Differences are paired.
    """
    counts = [counts_text(of_column) for of_column in columns]
    same = counts[0] if len(set(counts)) == 1 else ""
    heads = []
    for of_column, name, count in zip(columns, names, counts, strict=True):
        unpaired = any(not c.paired and len(c.cells) > 1 for c in of_column)
        mark = " (unpaired)" if unpaired and not differences else ""
        heads.append(name + ("" if same else f", n = {count}") + mark)
    return heads, same


def counts_text(comparisons: Sequence[Comparison]) -> str:
    """Return the numbers of examples of some comparisons, "50 / 60" if they differ."""
    return " / ".join(f"{n:,}" for n in dict.fromkeys(cell.n for c in comparisons for cell in c.cells.values()))


def _is_best(c: Comparison, arm: str) -> bool:
    return arm in c.cells and c.cells[arm].mark == "best"


def split_wide_table(table: Table, widest: int = _WIDEST) -> list[Table]:
    """Return a table as several tables with the same first columns, if its numbers take more than `widest` characters.

    A row without a number in one of the parts is left out of this part.
    """
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
        filled = [len(groups) == 1 or any(row[column] != "–" for column in group) for row in table.rows]
        shown = [number for number, is_filled in enumerate(filled) if is_filled]
        rows = [[table.rows[number][column] for column in kept] for number in shown]
        best = {(shown.index(row), kept.index(column)) for row, column in table.best if column in kept}
        parts.append(replace(table, heads=[table.heads[column] for column in kept], rows=rows, best=best))
    return parts


def _width(table: Table, column: int) -> int:
    """Return the characters that a column needs. Its head is broken between words and joints, and so are long texts."""
    words = max(len(word) for word in re.split(r"[\s+:_/-]", table.heads[column]))
    longest = max((len(row[column]) for row in table.rows), default=0)
    return _APART + max(words, _TEXT if is_long(table, column) else longest)


def is_long(table: Table, column: int) -> bool:
    """Return whether a column holds texts that may be broken between lines."""
    most = _TEXT if column < table.texts else _TEXT + 6  # a difference with its interval is shorter
    return any(len(row[column]) > most for row in table.rows)


def cell_text(cell: Cell | None, row: Result) -> str:
    """Return mean, interval and mark. No cell gives a dash."""
    if cell is None:
        return "–"
    return f"{interval_text(cell.value, cell.low, cell.high, row.scale)} {MARKS[cell.mark]}".rstrip()


def difference_text(c: Comparison, arm: str) -> str:
    """Return the difference of an arm to the baseline and its interval. No difference gives a dash."""
    if arm not in c.differences:
        return "–"
    return bounds_text(c.differences[arm].mean, *c.differences[arm].bounds, c.row.scale, sign=True)


def bounds_text(value: float, low: float, high: float, scale: str, sign: bool = False) -> str:
    """Return "1.2 [−0.3, 2.7]", or with `sign` "+1.2 [−0.3, +2.7]", as exact as the width allows.

    Shares end at 0 and 100 %. With `sign` they are differences, and end at -100 and 100 %.
    """
    if scale == SHARE:
        low, high = max(low, -1.0 if sign else 0.0), min(high, 1.0)
    middle, low_text, high_text = (number_text(end, scale, sign, (high - low) / 2) for end in (value, low, high))
    return f"{middle} [{low_text}, {high_text}]"


def interval_text(value: float, low: float, high: float, scale: str, sign: bool = False) -> str:
    """Return "82.5 ± 8.6". If the two half widths differ after rounding, return the text of `bounds_text`, "0.0 [0.0, 16.1]".

    A value outside its interval has the reason beside it: "7.0, bias-corrected [0.0, 6.7]".
    """
    if scale == SHARE:
        low, high = max(low, -1.0 if sign else 0.0), min(high, 1.0)
    if not low - ROUNDING <= value <= high + ROUNDING:
        return bounds_text(value, low, high, scale, sign).replace(" [", ", bias-corrected [", 1)
    half = (high - low) / 2
    below, above = (number_text(width, scale, half=half) for width in (value - low, high - value))
    if below == above or math.isclose(value - low, half, rel_tol=1e-6):
        return f"{number_text(value, scale, sign, half)} ± {number_text(half, scale, half=half)}"
    return bounds_text(value, low, high, scale, sign)


def row_text(row: Result) -> str:
    """Return the number of a row with its interval."""
    return interval_text(row.value, row.low, row.high, row.scale)


def kinds_text(comparisons: Sequence[Comparison]) -> str:
    """Return what the intervals of some comparisons cover, with the models if it differs between them, and their units."""
    models: dict[str, dict[str, None]] = {}
    units = {c.data: cell.units for c in comparisons for cell in c.cells.values() if c.data != AVERAGE}
    for c in comparisons:
        for arm, cell in c.cells.items():
            seeds = f" ({cell.seeds} seeds)" if cell.seeds else ""
            models.setdefault(interval_kind_text(cell.covers) + seeds, {})[arm] = None
    alone = len(models) == 1
    text = next(iter(models)) if alone else "; ".join(f"{', '.join(arms)}: {kind}" for kind, arms in models.items())
    if len(set(units.values())) == 1:
        counted = next(iter(units.values()))
    else:
        counted = ", ".join(f"{data} {of}" for data, of in units.items() if of)
    return f"{text}, {counted}" if counted else text


def number_text(value: float, scale: str, sign: bool = False, half: float = 0.0) -> str:
    """Return a number as exact as two digits of the half width of its interval. A share is shown in per cent.

    A share has at least one digit after the point, and no more if its width has a digit then. Without a width a share has one
    digit, and any other number has four digits in all.
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
    """Return a number's text with a typographic minus, and without a sign if it is zero."""
    if not text.strip("+-0."):
        return text.lstrip("+-")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def scale_text(metric: str, scale: str, better: Better | None = None) -> str:
    """Return a metric as `number_text` shows it. With `better` it has an arrow to the better side."""
    text = f"{metric} in %" if scale == SHARE else metric
    return f"{text} {arrow}" if (arrow := better and {LOWER: "↓", HIGHER: "↑"}.get(better)) else text
