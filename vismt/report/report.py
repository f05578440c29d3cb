"""report.md and report.html of a run: facts, result tables, the sections that the job gives, and how to cite the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismt.errors import UserError
from vismt.files import atomic_write, read_sealed
from vismt.report.comparison import AVERAGE, Comparison
from vismt.report.html import render_html, render_markdown
from vismt.report.sections import Section
from vismt.report.tables import Table, difference_text, interval_text, result_tables, split_corruptions
from vismt.stats import SHARE

LEGEND = (
    "Mean ± half width of the 95 % confidence interval over n. ★ best of the models, ≈ statistical tie with the best: "
    "the 95 % interval of the paired difference contains zero, or, where a row has no records of the same examples "
    "(marked “unpaired”), the two intervals overlap. Every set weighs the same in the average."
)
FLAT = " A width of 0.0 means that all n gave the same value, not that the number is certain."
CONFIG = "config.resolved.yaml"


@dataclass(frozen=True)
class Report:
    """Everything both formats show, as plain texts that are not yet escaped."""

    title: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    legend: str
    sections: list[Section]
    citation: list[str]
    config: str


def write_report(run_folder: Path, comparisons: Sequence[Comparison], sections: Sequence[Section]) -> Path:
    """Write report.md and report.html into a run folder; return the path of report.html.

    Args:
        run_folder: with run.json, and config.resolved.yaml where it is to be shown.
        comparisons: of the run's results.
        sections: what follows the result tables. Empty sections are left out.

    Raises:
        UserError: when run.json is missing or broken.
    """
    folder = Path(run_folder)
    about = _read_facts(folder)
    config = folder / CONFIG
    flat = any(cell.half == 0 for c in comparisons for cell in c.cells.values())
    report = Report(
        title=str(about.get("title") or folder.name),
        facts=_facts(about),
        tables=result_tables(comparisons),
        legend=LEGEND + FLAT if flat else LEGEND,
        sections=[section for section in sections if section.tables or section.pictures],
        citation=_citation(about, comparisons),
        config=config.read_text(encoding="utf8", errors="replace") if config.exists() else "",
    )
    atomic_write(folder / "report.md", render_markdown(report, folder))
    atomic_write(folder / "report.html", render_html(report))
    return folder / "report.html"


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        raise UserError(f"report: no run.json in '{folder}'; give a run folder, `vismt run CONFIG` makes one.")
    about = read_sealed(path, "report")
    if not about.get("config_hash"):
        raise UserError(f"report: '{path}' has no config_hash; `vismt evaluate {folder}` writes it again.")
    return about


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


def _citation(about: Mapping[str, Any], comparisons: Sequence[Comparison]) -> list[str]:
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
    revision = f", git revision {about['git_revision']}" if about.get("git_revision") else ""
    seeds = f", seeds {text}" if (text := _seeds(about)) else ""
    sentences.append(
        f"± is the half width of the 95 % confidence interval. vismt config {about['config_hash']}{revision}{seeds}; "
        "intervals cover the drawn test examples, not the spread over training seeds."
    )
    return sentences


def _sentence(c: Comparison, where: str, with_task: bool) -> str:
    """Return the numbers of all arms under one condition as a sentence."""
    row = c.row
    percent = " %" if row.scale == SHARE else ""
    values = "; ".join(
        f"{arm} {interval_text(cell.value, cell.half, row.scale)}{percent} (n = {cell.n:,} {row.unit})"
        for arm, cell in c.cells.items()
    )
    difference = f"; paired difference {difference_text(c)}" if c.difference else ""
    task = f"{row.task}, " if with_task else ""
    return f"{task}{row.protocol}, {c.condition}, {row.metric} {where}: {values}{difference}."


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
