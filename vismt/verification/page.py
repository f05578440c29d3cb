"""A verdict as one HTML page, by the report's renderer: findings, readers, a figure of the layers, and the facts."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

from vismt.report.plotting import (
    GRID,
    MUTED,
    PALETTE,
    RIGHT,
    SMALL,
    WRONG,
    axes_at,
    dress,
    legend,
    new_figure,
    save,
    short,
)
from vismt.report.renderers import render_html
from vismt.report.tables import Picture, Report, Section, Table
from vismt.storage.files import atomic_write
from vismt.verification.verdict import ModuleRow, Verdict

OF_FIT = {"right": RIGHT, "factor": WRONG, "other": PALETTE[4]}


def write_page(verdict: Verdict, path: Path) -> Path:
    """Write the page of a verdict; return its path. Raises UserError without matplotlib."""
    with tempfile.TemporaryDirectory() as folder:
        sections = [_findings(verdict), _readers(verdict), _probe(verdict), _layers(verdict, Path(folder))]
        facts = Section("Provenance", pairs=[("folder", verdict.folder), *verdict.about.items()])
        title = f"Verdict on {Path(verdict.folder).name}: {verdict.status}"
        page = render_html(Report(title, verdict.answer, sections=[*sections, facts]))
    atomic_write(path, page)
    return path


def _findings(verdict: Verdict) -> Section:
    rows = [[finding.level, finding.text, finding.fix or "–"] for finding in verdict.findings]
    note = "broken: a reader fails or computes something else; suspicious: look; note: no effect on the verdict."
    return _section("Findings", ["level", "what was seen", "fix"], rows, 3, note)


def _readers(verdict: Verdict) -> Section:
    lines = [(*row["line"].split(": ", 1), row) for row in verdict.readers]
    rows = [[reader, answer, row["source"], ". ".join(row["remarks"]) or "–"] for reader, answer, row in lines]
    note = "expected: by rules that were not run here."
    return _section("Readers", ["reader", "answer", "version", "remarks"], rows, 4, note)


def _section(title: str, heads: list[str], rows: list[list[str]], texts: int, note: str) -> Section:
    return Section(title, [(Table("", heads, rows, set(), texts), note)] if rows else [])


def _probe(verdict: Verdict) -> Section:
    def text(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4g}"

    rows = []
    for row in verdict.probe:
        value, low, high = (text(row[name]) for name in ("value", "low", "high"))
        rows.append([row["model"], row["measure"], f"{value} [{low}, {high}]", f"{row['n']:,}"])
    note = "[ ]: 95 % intervals by Student's t over examples; differences are paired."
    return _section("Probe", ["model", "measure", "value", "n"], rows, 2, note)


def _layers(verdict: Verdict, folder: Path) -> Section:
    """Return the figure: the size of the update of each module, by kind of module, and its place in a merged checkpoint."""
    relative = any(row.ratio is not None for row in verdict.modules)
    groups: dict[str, list[tuple[int, float, ModuleRow]]] = defaultdict(list)
    for number, row in enumerate(verdict.modules):
        value = row.ratio if relative else row.norm
        if value:
            groups[row.path.rpartition(".")[2]].append((number, value, row))
    if not groups:
        return Section("Layers")
    names = sorted(groups)[:12]
    height = 1.0 + 0.5 * len(names)
    figure = new_figure(9.0, height)
    axes = axes_at(figure, 1.5, 0.65, 7.2, height - 1.2)
    dress(axes, "")
    for place, name in enumerate(names):
        axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
        for _, value, row in groups[name]:
            color = OF_FIT.get(row.fit or "", MUTED)
            axes.plot(value, place, "o", markersize=6, alpha=0.7, color=color, markeredgewidth=0)
    axes.set_yticks(range(len(names)), [short(name, 18) for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(which="both", colors=MUTED, labelsize=SMALL, length=0)
    what = "|ΔW| / |W|" if relative else "|ΔW|"
    axes.set_xlabel(f"{what} (Frobenius norms)", color=MUTED, fontsize=9)
    kinds = {"right": "merged as it is", "factor": "merged with another factor", "other": "other changes"}
    shown = [kind for kind in kinds if any(row.fit == kind for row in verdict.modules)]
    rest = any((row.fit or "") not in OF_FIT for row in verdict.modules)
    words = [kinds[kind] for kind in shown] + (["not compared with a merged checkpoint"] if rest else [])
    legend(figure, words, [OF_FIT[kind] for kind in shown] + ([MUTED] if rest else []), 1.5)
    caption = f"A point for each adapted module: {what} by kind of module."
    note = "factor: k of W + k ΔW in the merged checkpoint. erased: share that rounding takes."
    picture = Picture(save(figure, folder / "layers.svg"), "Layers", caption)
    return Section("Layers", [(_modules(verdict), note)], [picture])


def _modules(verdict: Verdict) -> Table:
    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    numbers = ("rank", "rank_used", "stable_rank", "scale", "norm", "ratio", "factor", "erased")
    rows = [[row.path, row.fit or "–", *(text(getattr(row, name)) for name in numbers)] for row in verdict.modules]
    heads = ["module", "merged", "rank", "used", "stable rank", "scale", "|ΔW|", "|ΔW| / |W|", "factor", "erased"]
    return Table("Every module", heads, rows, set(), 2, folded=True)
