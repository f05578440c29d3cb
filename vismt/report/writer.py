"""The report of a run or of several: key figures, facts, result tables, sections, and how to cite the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.config.sections import RESOLVED
from vismt.report.comparison import AVERAGE, Comparison
from vismt.report.renderers import render_csv, render_html, render_latex, render_markdown
from vismt.report.results import FACTS, Result
from vismt.report.tables import (
    KeyFigure,
    Report,
    Section,
    counts_text,
    difference_text,
    interval_text,
    paper_tables,
    result_tables,
    scale_text,
    split_corruptions,
)
from vismt.storage.files import atomic_write, read_sealed
from vismt.storage.paths import regular_file
from vismt.uncertainty.intervals import LOWER, SHARE

LEGEND = (
    "Mean ± half width of the 95 % confidence interval over n{seeds}. ★ best of the models, ≈ statistical tie with the best: "
    "the 95 % interval of the paired difference contains zero, or, where a row has no records of the same examples "
    "(marked “unpaired”), the two intervals overlap. Every set weighs the same in the average."
)
ZERO_WIDTH_NOTE = " A width of 0.0 means that all n gave the same value, not that the number is certain."
# Format -> ending of its file.
FORMATS = {"html": "html", "md": "md", "csv": "csv", "latex": "tex"}
DEFAULT_FORMATS = ("html", "md")
MOST_KEYS = 4  # models in a key figure


@dataclass(frozen=True)
class Heading:
    """What a report says of the run that it is of.

    facts: names and values of the table at the top. source: where the numbers come from, for citations. config: the text of
    the configuration, "" for none.
    """

    title: str
    facts: list[tuple[str, str]]
    source: str
    config: str = ""


def run_heading(folder: Path) -> Heading:
    """Return the heading of a run folder; raise UserError when its run.json is missing or broken."""
    path = folder / FACTS
    if not path.exists():
        raise UserError(f"report: no run.json in '{folder}'; give a run folder, `vismt run CONFIG` makes one.")
    about = read_sealed(path, "report")
    if not about.get("config_hash"):
        raise UserError(f"report: '{path}' has no config_hash; `vismt evaluate {folder}` writes it again.")
    config = folder / RESOLVED
    revision = f", git revision {about['git_revision']}" if about.get("git_revision") else ""
    seeds = f", seeds {text}" if (text := _seeds(about)) else ""
    try:
        content = regular_file(config).read_text(encoding="utf8", errors="replace") if config.exists() else ""
    except OSError as error:
        raise UserError(f"run '{folder}': {RESOLVED} cannot be read: {error.strerror}.") from error
    return Heading(
        title=str(about.get("title") or folder.name),
        facts=_facts(about),
        source=f"vismt config {about['config_hash']}{revision}{seeds}",
        config=content,
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

    Args:
        folder: which holds the pictures of the sections.
        heading: of the run, or of several.
        results: all rows, for the file of comma-separated values.
        comparisons: of the results.
        sections: what follows the result tables. Empty sections are left out.
        formats: names of FORMATS, and of plotting.VECTORS, which write no file of their own.
    """
    flat = any(cell.half == 0 for c in comparisons for cell in c.cells.values())
    report = Report(
        title=heading.title,
        keys=[_key_figure(c) for c in key_comparisons(comparisons)],
        facts=heading.facts,
        tables=result_tables(comparisons),
        legend=LEGEND.format(seeds=_seeds_text(comparisons)) + (ZERO_WIDTH_NOTE if flat else ""),
        sections=[section for section in sections if section.tables or section.pictures],
        citation=_citation(heading.source, comparisons),
        config=heading.config,
    )
    writers: dict[str, Callable[[], str]] = {
        "md": lambda: render_markdown(report, folder),
        "csv": lambda: render_csv(results),
        "latex": lambda: render_latex(paper_tables(comparisons)),
        "html": lambda: render_html(report),
    }
    paths = []
    for name, render in writers.items():
        if name in formats:
            paths.append(folder / f"report.{FORMATS[name]}")
            atomic_write(paths[-1], render())
    return paths


def key_comparisons(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the clean scores by the first measure of up to three tasks, and the first one's under its strongest attack."""
    firsts: dict[str, Comparison] = {}
    for c in comparisons:
        first = firsts.setdefault(c.row.task, c)
        if c.data == AVERAGE and (c.block, c.condition) == (first.block, first.condition):
            firsts[c.row.task] = c
    chosen = list(firsts.values())[:3]
    if not chosen:
        return []
    column = (chosen[0].block, chosen[0].data)
    attacked = [c for c in comparisons if c.row.kind == "attack" and (c.block, c.data) == column]
    sign = -1 if chosen[0].row.better == LOWER else 1
    # Of several that break all, the last: the worst case over the others follows them.
    by_strength = sorted(attacked[::-1], key=lambda c: max(sign * cell.value for cell in c.cells.values()))
    return [chosen[0], *by_strength[:1], *chosen[1:]]


def _key_figure(c: Comparison) -> KeyFigure:
    arms = list(c.cells)
    row = c.row
    words = [scale_text(row.metric, row.scale), row.task, c.data, row.protocol, c.condition]
    about = f"{', '.join(dict.fromkeys(words))}; n = {counts_text([c])} {row.unit}, 95 % intervals"
    if c.difference is not None:
        about += f"; {arms[1]} − {arms[0]} on the same {row.unit}: {difference_text(c)}"
    shown = arms if len(arms) <= MOST_KEYS else dict.fromkeys([arms[0], _best(c)])
    return KeyFigure([(arm, interval_text(c.cells[arm].value, c.cells[arm].half, row.scale)) for arm in shown], about)


def _best(c: Comparison) -> str:
    """Return the best of the arms of a comparison."""
    return next((arm for arm, cell in c.cells.items() if cell.mark == "best"), next(iter(c.cells)))


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the first key figure in short, "accuracy in % 66.4 ± 3.7 (adapted)"; "" without results."""
    for c in key_comparisons(comparisons)[:1]:
        cell = c.cells[_best(c)]
        text = interval_text(cell.value, cell.half, c.row.scale)
        return f"{scale_text(c.row.metric, c.row.scale)} {text} ({_best(c)})"
    return ""


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader needs to judge and repeat the numbers."""
    adapted = about.get("adapt") or {}
    arms = {arm: _adaptation(arm_about) for arm, arm_about in adapted.get("arms", {}).items() if arm_about}
    method = "; ".join(f"{arm}: {text}" for arm, text in arms.items()) or _adaptation(adapted)
    if len(arms) == 1:
        method = next(iter(arms.values()))
    versions = "  ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    ends = (str(about[name]) for name in ("started", "finished") if about.get(name))
    pairs = [
        ("Command", about.get("command")),
        ("Git revision", about.get("git_revision")),
        ("Config hash", about["config_hash"]),
        ("Adaptation", method),
        ("Hardware", about.get("hardware")),
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


def _adaptation(about: Mapping[str, Any]) -> str:
    if not about.get("method"):
        return ""
    rank = f", rank {about['rank']}" if about.get("rank") else ""
    if not about.get("total"):
        return f"{about['method']}{rank}"
    share = f"{100 * about['trainable'] / about['total']:.2f} %"
    return f"{about['method']}{rank}, {about['trainable']:,} trainable of {about['total']:,} parameters, {share}"


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
    covered = "the drawn test examples and, where seeds are counted, the spread over training seeds"
    if not any(cell.seeds for c in comparisons for cell in c.cells.values()):
        covered = "the drawn test examples, not the spread over training seeds"
    sentences.append(f"± is the half width of the 95 % confidence interval. {source}; intervals cover {covered}.")
    return sentences


def _seeds_text(comparisons: Sequence[Comparison]) -> str:
    """Return which models' intervals have the spread over training seeds; "" for none."""
    arms: dict[int, dict[str, None]] = {}
    for c in comparisons:
        for arm, cell in c.cells.items():
            arms.setdefault(cell.seeds, {})[arm] = None
    texts = [f"{', '.join(names)}: {count} seeds" for count, names in arms.items() if count]
    return f" and, for models with several trainings ({'; '.join(texts)}), over the seeds; differences likewise" * bool(
        texts
    )


def _sentence(c: Comparison, where: str, with_task: bool) -> str:
    """Return the numbers of all arms under one condition as a sentence."""
    row = c.row
    percent = " %" if row.scale == SHARE else ""
    values = []
    for arm, cell in c.cells.items():
        seeds = f", {cell.seeds} seeds" if cell.seeds else ""
        values.append(
            f"{arm} {interval_text(cell.value, cell.half, row.scale)}{percent} (n = {cell.n:,} {row.unit}{seeds})"
        )
    difference = f"; paired difference {difference_text(c)}" if c.difference else ""
    task = f"{row.task}, " if with_task else ""
    return f"{task}{row.protocol}, {c.condition}, {row.metric} {where}: {'; '.join(values)}{difference}."


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
