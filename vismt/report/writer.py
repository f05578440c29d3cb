"""The report of a run or of several: key figures, facts, result tables, sections, and how to cite the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.config.sections import RESOLVED
from vismt.report.comparison import AVERAGE, Comparison, shown_name
from vismt.report.renderers import render_csv, render_html, render_latex, render_markdown
from vismt.report.results import FACTS, Result
from vismt.report.tables import (
    KeyFigure,
    Report,
    Section,
    bounds_text,
    cell_text,
    counts_text,
    difference_tables,
    difference_text,
    interval_text,
    kinds_text,
    measure_tables,
    paper_tables,
    result_tables,
    scale_text,
    split_corruptions,
    strongest_attack,
    without_further,
)
from vismt.storage.files import atomic_write, read_sealed
from vismt.storage.paths import read_bytes
from vismt.uncertainty.intervals import LOWER, SHARE, interval_kind_text

LEGEND = (
    "★ best of the models, ≈ statistical tie with the best: the 95 % interval of the paired difference contains zero, or, where "
    "a row has no records of the same examples (marked “unpaired”), the two intervals overlap. The average gives every set "
    "the same weight."
)
ZERO_WIDTH_NOTE = " A width of 0.0 means that all n gave the same value, not that the number is certain."
# Format -> ending of its file.
FORMATS = {"html": "html", "md": "md", "csv": "csv", "latex": "tex"}
DEFAULT_FORMATS = ("html", "md")
MOST_KEYS = 4  # models in a key figure
# The types of what the report reads of run.json; an earlier version, or a run that has just begun, may lack any of them.
FACT_TYPES = {
    "title": str,
    "command": str,
    "git_revision": str,
    "config_hash": str,
    "hardware": str,
    "versions": dict[str, str],
    "seed": int | None,
    "seeds": list[int],
    "evaluation_seed": int | None,
    "started": str,
    "finished": str,
    "wall_time_s": float,
    "cpu_time_s": float,
    "adapt": dict,
    "processes": int,
}


@dataclass(frozen=True)
class Heading:
    """What a report says of the run that it is of.

    facts: names and values of the table at the end. source: where the numbers come from, for citations. config: the text of
    the configuration, "" for none. models: a line about each evaluated model by its name.
    """

    title: str
    facts: list[tuple[str, str]]
    source: str
    config: str = ""
    models: Mapping[str, str] = field(default_factory=dict)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of run.json of a run folder, {} where there is none. Raises UserError for other content than a run's."""
    path = folder / FACTS
    return read_sealed(path, f"run '{folder}'", may=FACT_TYPES) if path.exists() else {}


def run_heading(folder: Path, models: Mapping[str, str] | None = None) -> Heading:
    """Return the heading of a run folder, with a line about each evaluated model by its name; raise where run.json is broken."""
    if not (folder / FACTS).exists():
        raise UserError(f"report: no run.json in '{folder}'; give a run folder, `vismt run CONFIG` makes one.")
    about = read_facts(folder)
    if not about.get("config_hash"):
        raise UserError(f"report: '{folder / FACTS}' has no config_hash; `vismt evaluate {folder}` writes it again.")
    config = folder / RESOLVED
    revision = f", git revision {about['git_revision']}" if about.get("git_revision") else ""
    seeds = f", seeds {text}" if (text := _seeds(about)) else ""
    try:
        content = read_bytes(config).decode(errors="replace") if config.exists() else ""
    except OSError as error:
        raise UserError(f"run '{folder}': {RESOLVED} cannot be read: {error.strerror}.") from error
    return Heading(
        title=str(about.get("title") or folder.name),
        facts=_facts(about),
        source=f"vismt config {about['config_hash']}{revision}{seeds}",
        config=content,
        models=dict(models or {}),
    )


def write_report(
    folder: Path,
    heading: Heading,
    results: Sequence[Result],
    comparisons: Sequence[Comparison],
    sections: Sequence[Section],
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> list[Path]:
    """Write a report into a folder in some of FORMATS; return its files.

    folder: which holds the pictures of the sections. comparisons: of the results. sections: what follows the result tables;
    empty ones are left out. formats: names of FORMATS, and of plotting.FIGURES, which write no file of their own.
    """
    flat = any(cell.low == cell.high for c in comparisons for cell in c.cells.values())
    conditions = {c.condition for c in comparisons}
    of_measures, comparisons = measure_tables(comparisons), without_further(comparisons)
    tables = result_tables(comparisons)
    table, note = tables[-1]
    tables[-1] = (table, f"{note} {LEGEND}{ZERO_WIDTH_NOTE if flat else ''}")
    shown = [Section("Results", tables), Section("Differences", difference_tables(comparisons))]
    shown += [Section("All measures", of_measures), *sections]
    report = Report(
        title=heading.title,
        answer=answer(comparisons),
        keys=[_key_figure(c) for c in key_comparisons(comparisons)],
        models=[(shown_name(arm, conditions), text) for arm, text in heading.models.items()],
        sections=[section for section in shown if section.tables or section.pictures],
        citation=_citation(heading.source, comparisons),
        facts=heading.facts,
        config=heading.config,
    )
    writers: dict[str, Callable[[], str]] = {
        "md": lambda: render_markdown(report, folder),
        "csv": lambda: render_csv(results),
        "latex": lambda: render_latex([*paper_tables(comparisons), *of_measures]),
        "html": lambda: render_html(report),
    }
    paths = []
    for name, render in writers.items():
        if name in formats:
            paths.append(folder / f"report.{FORMATS[name]}")
            atomic_write(paths[-1], render())
    return paths


def answer(comparisons: Sequence[Comparison]) -> str:
    """Return the difference that matters as a sentence: of the first measure, under its strongest attack, else clean.

    It is the difference to the baseline of the arm that is best under this condition, whose interval does not cover this choice;
    "" where nothing is paired.
    """
    keys = key_comparisons(comparisons)
    if not keys or not keys[0].differences:
        return ""
    c, row = keys[0], keys[0].row
    sign = -1 if row.better == LOWER else 1
    arm = max(c.differences, key=lambda name: sign * c.differences[name].mean)
    metric, _, unit = row.metric.partition(" in ")
    unit = "points" if row.scale == SHARE else unit
    attacked = row.kind == "attack"
    under = f" under {c.condition}" if attacked else ""
    better, size, ends = _change(c, arm)
    if better is None:
        text = f"{arm} and {c.base} do not differ measurably in {metric}{under}: {difference_text(c, arm)}"
    elif attacked and metric == "accuracy":
        text = f"{arm} withstands {size} points {'more' if better else 'less'} than {c.base}{under} {ends}"
    else:
        verb = "improves on" if better else "falls behind"
        text = f"{arm} {verb} {c.base} by {size} {unit} in {metric}{under} {ends}"
    clean = keys[1] if attacked and len(keys) > 1 and arm in keys[1].differences else None
    if clean is not None:
        gains, size, ends = _change(clean, arm)
        if gains is not None:
            again = f"{arm} " if better is None else ""
            text += f", and {again}{'gains' if gains else 'loses'} {size} clean {ends}"
        else:
            text += f", {'nor' if better is None else 'and does not differ measurably'} clean: {difference_text(clean, arm)}"
    many = len(c.differences)
    chosen = f"; the best of {many} arms by these examples" if many > 1 else ""
    return f"{text} ({_about(c, without=[c.condition] if attacked else ())}{chosen})."


def _change(c: Comparison, arm: str) -> tuple[bool | None, str, str]:
    """Return whether an arm is better than the baseline, None where the interval has 0; the size, and "[low, high]" of it."""
    value, (low, high) = c.differences[arm].mean, c.differences[arm].bounds
    least, most = sorted((abs(low), abs(high)))
    size, ends = bounds_text(abs(value), least, most, c.row.scale).split(" ", 1)
    return None if low <= 0 <= high else (value > 0) == (c.row.better != LOWER), size, ends


def key_comparisons(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the first measure of the first task under its strongest attack, then the clean scores of up to three tasks."""
    chosen = _firsts(comparisons)[:3]
    column = [c for c in comparisons if chosen and (c.block, c.data) == (chosen[0].block, chosen[0].data)]
    strongest = strongest_attack(column)
    return [*(c for c in column if c.condition == strongest), *chosen]


def _firsts(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the first score of each task, on average over the sets where there are several."""
    firsts: dict[str, Comparison] = {}
    for c in comparisons:
        first = firsts.setdefault(c.row.task, c)
        if c.data == AVERAGE and (c.block, c.condition) == (first.block, first.condition):
            firsts[c.row.task] = c
    return list(firsts.values())


def _key_figure(c: Comparison) -> KeyFigure:
    arms = list(c.cells)
    shown = arms if len(arms) <= MOST_KEYS else dict.fromkeys([arms[0], _best(c)])
    return KeyFigure([(arm, cell_text(replace(c.cells[arm], mark=""), c.row)) for arm in shown], _about(c))


def _about(c: Comparison, without: Sequence[str] = ()) -> str:
    """Return measure, task, set, protocol, condition and n of a comparison, and what its intervals cover, less `without`."""
    row = c.row
    words = dict.fromkeys([scale_text(row.metric, row.scale), row.task, c.data, row.protocol, c.condition])
    words = dict.fromkeys(word for word in words if word not in without)
    return f"{', '.join(words)}; n = {counts_text([c])} {row.unit}; {kinds_text([c])}"


def _best(c: Comparison) -> str:
    return next((arm for arm, cell in c.cells.items() if cell.mark == "best"), next(iter(c.cells)))


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the first score of the best arm with what its interval covers; "" without results."""
    for c in _firsts(comparisons)[:1]:
        cell = replace(c.cells[_best(c)], mark="")
        kind = interval_kind_text(cell.covers, cell.units)
        return f"{scale_text(c.row.metric, c.row.scale)} {cell_text(cell, c.row)} ({_best(c)}; {kind})"
    return ""


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = "  ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    processes = about.get("processes", 1)
    ends = (str(about[name]) for name in ("started", "finished") if about.get(name))
    pairs = [
        ("Command", about.get("command")),
        ("Git revision", about.get("git_revision")),
        ("Config hash", about["config_hash"]),
        ("Hardware", about.get("hardware")),
        ("Processes of a training", processes if processes > 1 else None),
        ("Seeds", _seeds(about)),
        ("Wall time", _duration(about.get("wall_time_s"))),
        ("Run", " to ".join(end.replace("T", " ").replace("+00:00", " UTC") for end in ends)),
        ("Versions", versions),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _seeds(about: Mapping[str, Any]) -> str:
    seeds = about.get("seeds", [about["seed"]] if about.get("seed") is not None else [])
    texts = [f"{', '.join(str(seed) for seed in seeds)} (training)"] if seeds else []
    if about.get("evaluation_seed") is not None:
        texts.append(f"{about['evaluation_seed']} (evaluation)")
    return ", ".join(texts)


def _citation(source: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Return sentences that carry n, interval and protocol; of a block with an average only this is put into words."""
    shown, corrupted = split_corruptions(comparisons)
    several = len({c.row.task for c in comparisons}) > 1
    averaged = {c.block for c in shown if c.data == AVERAGE}
    sentences = []
    for c in shown:
        if c.data == AVERAGE:
            sets = sorted({other.data for other in shown if other.block == c.block} - {AVERAGE})
            sentences.append(_sentence(c, f"on average over {len(sets)} data sets ({', '.join(sets)})", several))
        elif c.block not in averaged:
            sentences.append(_sentence(c, f"on {c.data}", several))
    if corrupted:
        kinds = len({c.condition for c in corrupted})
        sentences.append(
            f"The numbers under {kinds} corruptions are in the table of corruptions, with n and intervals."
        )
    sentences.append(f"± is half the width of an interval, [ ] are its ends. {source}.")
    return sentences


def _sentence(c: Comparison, where: str, with_task: bool) -> str:
    row = c.row
    percent = " %" if row.scale == SHARE else ""
    numbers = {arm: interval_text(cell.value, cell.low, cell.high, row.scale) for arm, cell in c.cells.items()}
    values = [f"{arm} {number}{percent}" for arm, number in numbers.items()]
    differences = [f"{arm} − {c.base} {difference_text(c, arm)}" for arm in c.differences]
    paired = f"; paired differences {', '.join(differences)}" if differences else ""
    task = f"{row.task}, " if with_task else ""
    about = f"n = {counts_text([c])} {row.unit}; {kinds_text([c])}"
    return f"{task}{row.protocol}, {c.condition}, {row.metric} {where}: {', '.join(values)}{paired} ({about})."


def _duration(seconds: float | None) -> str:
    if seconds is None or not 0 < seconds < math.inf:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
