"""report.md and report.html of a run, from the files of its folder alone.

Reads run.json and results.jsonl, and where they are there metrics.jsonl, records/, panels/, masking.jsonl, experts/, pool/,
arms/, seeds.jsonl, examples.npz, dense_seeds.jsonl, dense_panels.npz, routers/ and config.resolved.yaml.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.jobs.classification.report import multitask_curves, multitask_panels, multitask_tables
from vismt.jobs.dense.report import dense_curves, dense_panels, dense_tables
from vismt.jobs.fewshot.masking_report import NOTE, read_masking
from vismt.jobs.fewshot.merge_settings import chosen_settings
from vismt.jobs.fewshot.report import Picture, corruption_pictures, pool_pictures
from vismt.jobs.lm.report import lm_curves, lm_tables
from vismt.report import figures
from vismt.report.comparison import AVERAGE, Comparison, compare, is_share, read_results
from vismt.report.html import render_html, render_markdown
from vismt.report.routers import router_pictures
from vismt.report.tables import Table, difference_text, number_text, result_tables, split_corruptions

LEGEND = (
    "Mean ± half width of the 95 % confidence interval over n. ★ best of the models, ≈ statistical tie with the best: "
    "the 95 % interval of the paired difference contains zero, or, where a row has no records of the same episodes "
    "(marked “unpaired”), the two intervals overlap. Every set weighs the same in the average."
)


FLAT = " A width of 0.0 says that all n gave the same value, not that the number is certain."


@dataclass(frozen=True)
class Report:
    """Everything both formats show, as plain texts that are not yet escaped."""

    title: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    legend: str
    aside: list[tuple[Table, str]]  # tables of what is no result, each with its note
    curves: list[Picture]
    panels: list[Picture]
    citation: list[str]
    config: str


def write_report(run_folder: Path) -> Path:
    """Write report.md, report.html and figures/*.png into a run folder; returns the path of report.html.

    Sections whose files are missing are left out. Raises UserError when run.json or results.jsonl is missing or broken,
    and when a number lacks its n, confidence interval or config hash.
    """
    folder = Path(run_folder)
    about = _read_facts(folder)
    results = read_results(folder, str(about["config_hash"]))
    comparisons = compare(results, folder)
    heads, checks = read_masking(folder)
    config = folder / "config.resolved.yaml"
    report = Report(
        title=str(about.get("title") or folder.name),
        facts=_facts(about, comparisons),
        tables=result_tables(comparisons),
        legend=LEGEND + FLAT * any(cell.ci95 == 0 for c in comparisons for cell in c.cells.values()),
        aside=[
            *[(Table("Gradient masking", heads, checks, set()), NOTE)] * bool(checks),
            *chosen_settings(folder),
            *multitask_tables(folder),
            *dense_tables(folder),
            *lm_tables(folder),
        ],
        curves=[
            *_curves(folder, comparisons, list(dict.fromkeys(row["model"] for row in results))),
            *multitask_curves(folder),
            *dense_curves(folder),
            *lm_curves(folder),
            *corruption_pictures(folder, comparisons),
            *pool_pictures(folder, results),
        ],
        panels=[*_panels(folder), *multitask_panels(folder), *dense_panels(folder), *router_pictures(folder)],
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
    try:
        about = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"report: '{path}' is no JSON ({error}); `vismt evaluate {folder}` writes it anew.") from error
    if not isinstance(about, dict) or not about.get("config_hash"):
        raise UserError(f"report: '{path}' has no config_hash; `vismt evaluate {folder}` writes it anew.")
    return about


def _facts(about: dict[str, Any], comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """What a reader needs to judge and repeat the numbers."""
    adapted = about.get("adapt") or {}
    seeds = ", ".join(str(seed) for seed in sorted({c.seed for c in comparisons}))
    training = "" if about.get("seed") is None else f"{about['seed']} (run), "
    method = "; ".join(f"{arm}: {_adaptation(told)}" for arm, told in adapted.get("arms", {}).items()) or _adaptation(
        adapted
    )
    versions = "  ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    times = " to ".join(
        str(about[name]).replace("T", " ").replace("+00:00", " UTC")
        for name in ("started", "finished")
        if about.get(name)
    )
    pairs = [
        ("Command", about.get("command")),
        ("Git revision", about.get("git_revision")),
        ("Config hash", about["config_hash"]),
        ("Adaptation", method),
        ("Hardware", about.get("hardware")),
        ("Seeds", f"{training}{seeds} (evaluation)"),
        ("Wall time", _duration(about.get("wall_time_s"))),
        ("Run", times),
        ("Versions", versions),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _adaptation(told: dict[str, Any]) -> str:
    if not told.get("method"):
        return ""
    rank = f", rank {told['rank']}" if told.get("rank") else ""
    if not told.get("total"):
        return f"{told['method']}{rank}"
    share = f"{100 * told['trainable'] / told['total']:.2f} %"
    return f"{told['method']}{rank}, {told['trainable']:,} trainable of {told['total']:,} parameters, {share}"


def _curves(folder: Path, comparisons: Sequence[Comparison], models: Sequence[str]) -> list[Picture]:
    pictures = []
    logged = read_lines(folder / "metrics.jsonl")
    if any(row.get("loss") is not None or row.get("accuracy") is not None for row in logged):
        path = figures.training_curve(logged, folder / "figures" / "training.png")
        text = f"{len(logged):,} logged steps. Thin: as logged. Thick: running mean over a twentieth of the run."
        pictures.append(Picture(path, "Training", text))
    for metric in dict.fromkeys(c.metric for c in comparisons):
        chosen = split_corruptions([c for c in comparisons if c.metric == metric])[0]
        name = "domains.png" if metric == "accuracy" else f"domains-{'-'.join(metric.split()).replace('/', '-')}.png"
        path = figures.domain_bars(chosen, folder / "figures" / name, models)
        chance = "; the dashed line, where there is one, is chance" * (metric == "accuracy")
        text = f"Whiskers are 95 % confidence intervals{chance}."
        pictures.append(Picture(path, f"{metric[:1].upper()}{metric[1:]} per data set", text))
    return pictures


def _panels(folder: Path) -> list[Picture]:
    pictures = []
    for path in sorted((folder / "panels").glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                panel = {name: file[name] for name in file.files}
            drawn = figures.episode_grid(panel, folder / "figures" / f"episode-{path.stem}.png")
        except (ValueError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"report: '{path}' is no panel of an episode ({error}); delete it and run `vismt evaluate {folder}`."
            ) from error
        pictures.append(Picture(drawn, path.stem, _panel_caption(panel), "Episodes"))
    return pictures


def _panel_caption(panel: dict[str, np.ndarray]) -> str:
    truth, count = panel["query_labels"], len(panel["query_labels"])
    text = f"One episode. Of {count} query images in the panel file, {int((panel['predictions'] == truth).sum())} are right"
    if "adversarial_predictions" not in panel:
        return text + "."
    attack = str(panel["condition"]) if "condition" in panel else "attack"
    return f"{text}, {int((panel['adversarial_predictions'] == truth).sum())} under {attack}. ✓ right, ✗ wrong."


def _citation(about: dict[str, Any], comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences that carry n, interval and protocol; over many sets only the averages are put into words."""
    shown, corrupted = split_corruptions(comparisons)
    averages = [c for c in shown if c.data == AVERAGE]
    sentences = []
    for c in averages or shown:
        within = {d.data for d in comparisons if (d.protocol, d.condition) == (c.protocol, c.condition)} - {AVERAGE}
        where = f"on average over {len(within)} data sets ({', '.join(sorted(within))})" if averages else f"on {c.data}"
        unit = " %" if is_share(c.metric) else ""
        values = "; ".join(
            f"{model} {number_text(cell.value, c.metric)} ± {number_text(cell.ci95, c.metric)}{unit} (n = {cell.n:,} {c.unit})"
            for model, cell in c.cells.items()
        )
        difference = f"; paired difference {difference_text(c)}" if c.difference else ""
        sentences.append(f"{c.protocol}, {c.condition}, {c.metric} {where}: {values}{difference}.")
    if corrupted:
        kinds = len({c.condition for c in corrupted})
        sentences.append(
            f"The numbers under {kinds} corruptions are in the table of corruptions, n and intervals with them."
        )
    revision = f", git revision {about['git_revision']}" if about.get("git_revision") else ""
    seeds = ", ".join(str(seed) for seed in sorted({c.seed for c in comparisons}))
    sentences.append(
        f"± is the half width of the 95 % confidence interval. vismt config {about['config_hash']}{revision}, evaluation "
        f"seed {seeds}; intervals cover the drawn test units, not the spread over training seeds."
    )
    return sentences


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
