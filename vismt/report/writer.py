"""The report of a run or of several: key figures, facts, result tables, sections, and how to cite the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.config.sections import RESOLVED
from vismt.report.comparison import AVERAGE, Comparison, by_score, first_of_tasks, key_comparisons
from vismt.report.conclusion import Conclusion, about
from vismt.report.renderers import render_csv, render_html, render_latex, render_markdown
from vismt.report.results import FACTS, Result
from vismt.report.tables import (
    KeyFigure,
    Report,
    Section,
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
    without_further,
)
from vismt.storage.files import JsonObject, atomic_write, read_sealed
from vismt.storage.paths import read_bytes
from vismt.uncertainty.intervals import SHARE, interval_kind_text

LEGEND = (
    "★ best of the models, ≈ statistical tie with the best: the interval of the paired difference contains zero, at the level at "
    "which the intervals of the answer hold jointly, or has no width. Where a row has no records of the same examples (marked "
    "“unpaired”), the two intervals overlap. The average gives every set the same weight."
)
ZERO_WIDTH_NOTE = " A width of 0.0 means that all n gave the same value, not that the number is certain."
# Format -> ending of its file.
FORMATS = {"html": "html", "md": "md", "csv": "csv", "latex": "tex", "json": "json"}
DEFAULT_FORMATS = ("html", "md")
MOST_KEYS = 4  # number of models in a key figure
# Types of what the report reads of run.json. A run that has just begun may lack any of them.
FACT_TYPES = {
    "title": str,
    "command": str,
    "working_folder": str,
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
    """What a report says about its run.

    Args:
        title: Title of the page.
        facts: Names and values of the table at the end.
        source: Source of the numbers, for citations.
        config: Text of the configuration, "" for none.
    """

    title: str
    facts: list[tuple[str, str]]
    source: str
    config: str = ""


def read_run_facts(folder: Path) -> JsonObject:
    """Return the content of run.json of a run folder, {} if there is none. Raise UserError for other content than a run's."""
    path = folder / FACTS
    return read_sealed(path, f"run '{folder}'", may=FACT_TYPES) if path.exists() else {}


def run_heading(folder: Path) -> Heading:
    """Return the heading of a run folder. Raise UserError if run.json is broken."""
    if not (folder / FACTS).exists():
        raise UserError(f"report: no run.json in '{folder}'; give a run folder, `vismt run CONFIG` makes one.")
    about = read_run_facts(folder)
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
    )


def result_sections(comparisons: Sequence[Comparison]) -> list[Section]:
    """Return the sections of results, of differences and of all measures."""
    if not comparisons:
        return []
    of_measures, comparisons = measure_tables(comparisons), without_further(comparisons)
    flat = any(cell.low == cell.high for c in comparisons for cell in c.cells.values())
    tables = result_tables(comparisons)
    table, note = tables[-1]
    tables[-1] = (table, f"{note} {LEGEND}{ZERO_WIDTH_NOTE if flat else ''}")
    differences = Section("Differences", difference_tables(comparisons))
    return [Section("Results", tables), differences, Section("All measures", of_measures)]


def write_report(
    folder: Path,
    heading: Heading,
    results: Sequence[Result],
    comparisons: Sequence[Comparison],
    conclusion: Conclusion | None,
    sections: Sequence[Section],
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> list[Path]:
    """Write a report into a folder in some of FORMATS. Return its files.

    Args:
        folder: Folder that holds the pictures of the sections.
        heading: Heading of the run.
        results: Rows for CSV.
        comparisons: Comparisons of the results.
        conclusion: Answer of the report, None without one.
        sections: Parts of the report in their order. Empty parts are left out.
        formats: Names of FORMATS, and of plotting.FIGURES, which write no file of their own.
    """
    of_measures, comparisons = measure_tables(comparisons), without_further(comparisons)
    files = [(RESOLVED, heading.config)] if heading.config else []
    citation = _citation(heading.source, comparisons) if comparisons else []
    report = Report(
        title=heading.title,
        answer=conclusion.text if conclusion else "",
        basis=conclusion.basis if conclusion else "",
        keys=[_key_figure(c) for c in key_comparisons(comparisons)],
        sections=[
            *sections,
            Section("How to cite these numbers", quotations=citation),
            Section("Provenance", pairs=heading.facts, files=files),
        ],
    )
    writers: dict[str, Callable[[], str]] = {
        "md": lambda: render_markdown(report, folder),
        "csv": lambda: render_csv(results),
        "latex": lambda: render_latex([*paper_tables(comparisons), *of_measures]),
        "json": lambda: json.dumps(conclusion and asdict(conclusion), indent=1, ensure_ascii=False) + "\n",
        "html": lambda: render_html(report),
    }
    paths = []
    for name, render in writers.items():
        if name in formats:
            paths.append(folder / f"report.{FORMATS[name]}")
            atomic_write(paths[-1], render())
    return paths


def _key_figure(c: Comparison) -> KeyFigure:
    arms = list(c.cells)
    shown = arms if len(arms) <= MOST_KEYS else dict.fromkeys([arms[0], by_score(c, c.cells)[0]])
    unit = " %" if c.row.scale == SHARE else ""
    return KeyFigure([(arm, cell_text(replace(c.cells[arm], mark=""), c.row) + unit) for arm in shown], about(c))


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the first score of the best arm with what its interval covers. Return "" without results."""
    for c in first_of_tasks(comparisons)[:1]:
        arm = by_score(c, c.cells)[0]
        cell = replace(c.cells[arm], mark="")
        kind = interval_kind_text(cell.covers, cell.units)
        return f"{scale_text(c.row.metric, c.row.scale)} {cell_text(cell, c.row)} ({arm}; {kind})"
    return ""


def _facts(about: JsonObject) -> list[tuple[str, str]]:
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
        ("Wall time", console.duration(about.get("wall_time_s"))),
        ("Run", " to ".join(end.replace("T", " ").replace("+00:00", " UTC") for end in ends)),
        ("Versions", versions),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _seeds(about: JsonObject) -> str:
    seeds = about.get("seeds", [about["seed"]] if about.get("seed") is not None else [])
    texts = [f"{', '.join(str(seed) for seed in seeds)} (training)"] if seeds else []
    if about.get("evaluation_seed") is not None:
        texts.append(f"{about['evaluation_seed']} (evaluation)")
    return ", ".join(texts)


def _citation(source: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Return sentences that carry n, interval and protocol. If a block has an average, only the average is put into words."""
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
