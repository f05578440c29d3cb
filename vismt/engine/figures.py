"""The pictures of a report as PNG: training curve, accuracy per domain with intervals, one episode with its attack.

Drawn on matplotlib's object interface, so no global figure, backend or style is touched. Colours are those of Okabe and
Ito, which colour-blind readers tell apart; right and wrong also differ by their sign.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vismt.engine.comparison import AVERAGE, Comparison, is_share
from vismt.errors import UserError
from vismt.lowrank.store import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#667080", "#e6e9ee"
PALETTE = ("#9aa4b2", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
RIGHT, WRONG = "#0072b2", "#d55e00"
SHOWN_CLASSES, SHOWN_QUERIES, SHOWN_COLUMNS = 8, 2, 3


def training_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, and accuracy where it was logged, against the step: each logged value thin, their running mean thick.

    Args:
        metrics: lines of metrics.jsonl; a value that is missing or None leaves a gap.
        path: the PNG to write.
    """
    names = [name for name in ("loss", "accuracy") if any(row.get(name) is not None for row in metrics)]
    if not names:
        raise UserError(f"training curve: none of {len(metrics)} logged lines has a loss or an accuracy.")
    figure = _figure(8.0, 2.5 * len(names) + 0.3)
    for place, (name, color) in enumerate(zip(names, (WRONG, RIGHT))):
        axes = figure.add_subplot(len(names), 1, place + 1)
        kept = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        steps, values = (np.array(column, dtype=float) for column in zip(*kept, strict=True))
        factor = 100.0 if name == "accuracy" else 1.0
        smooth = _running_mean(values) * factor
        lone = "o" if len(steps) == 1 else None
        axes.plot(steps, values * factor, color=color, alpha=0.28, linewidth=1.0, marker=lone)
        axes.plot(steps, smooth, color=color, linewidth=2.2, solid_capstyle="round")
        unit = " %" if name == "accuracy" else ""
        axes.annotate(
            f"{smooth[-1]:.3g}{unit}", (steps[-1], smooth[-1]), xytext=(7, 0), textcoords="offset points",
            va="center", color=color, fontsize=10, fontweight="bold", annotation_clip=False,
        )
        _dress(axes, "Training loss" if name == "loss" else "Training accuracy (%)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        if place == len(names) - 1:
            axes.set_xlabel("step", color=MUTED, fontsize=9)
        else:
            axes.tick_params(labelbottom=False)
    figure.tight_layout(h_pad=1.6, rect=(0, 0, 0.95, 1))
    return _save(figure, path)


def domain_bars(comparisons: Sequence[Comparison], path: Path) -> Path:
    """One panel for each protocol and condition: a bar for each set and model, with the 95 % interval and chance level.

    Args:
        comparisons: of one metric, in the order to draw; sets run down the panel, conditions across.
        path: the PNG to write.
    """
    blocks = list(dict.fromkeys((c.protocol, c.seed) for c in comparisons))
    models = list(dict.fromkeys(model for c in comparisons for model in c.cells))
    conditions = list(dict.fromkeys(c.condition for c in comparisons))
    columns = min(len(conditions), SHOWN_COLUMNS)
    bands = math.ceil(len(conditions) / columns)
    names = [list(dict.fromkeys(c.data for c in comparisons if (c.protocol, c.seed) == block)) for block in blocks]
    heights = [max(1.5, len(rows) * (0.2 * len(models) + 0.22)) for rows in names for _ in range(bands)]
    label = min(2.6, 0.085 * max(len(_short(c.data, 28)) for c in comparisons) + 0.25)
    width, top, gap = 1.0 + label + columns * 3.5, 0.55, 1.0
    height = top + sum(heights) + gap * len(heights)
    figure = _figure(width, height)
    _legend(figure, models, (label / width, 1 - 0.27 / height))
    reach = 1.0 if is_share(comparisons[0].metric) else max(c.value + c.ci95 for x in comparisons for c in x.cells.values())
    panel = (width - label - 0.35) / columns
    offset = top
    for place, rows in enumerate(heights):
        block, band = divmod(place, bands)
        offset += 0.55
        for column, condition in enumerate(conditions[band * columns : (band + 1) * columns]):
            box = ((label + column * panel) / width, 1 - (offset + rows) / height, (panel - 0.45) / width, rows / height)
            axes = figure.add_axes(box)
            chosen = {
                c.data: c for c in comparisons if (c.protocol, c.seed, c.condition) == (*blocks[block], condition)
            }
            _bars(axes, chosen, names[block], models, reach, first=column == 0)
            _heading(axes, chosen, condition, blocks[block][0])
        offset += rows + gap - 0.55
    return _save(figure, path)


def episode_grid(panel: Mapping[str, np.ndarray], path: Path) -> Path:
    """One episode: a column for each class; support, then queries with predictions, attacked, and what was changed.

    Args:
        panel: the arrays of a panels/*.npz: support, query and optionally adversarial uint8 (., 3, h, w), their labels
            and predictions int (.,), classes (k,) of text. At most 8 classes and 2 queries of each are drawn.
        path: the PNG to write.
    """
    classes = [str(name) for name in panel["classes"]][:SHOWN_CLASSES]
    attacked = "adversarial" in panel
    queries = [np.flatnonzero(panel["query_labels"] == k)[:SHOWN_QUERIES] for k in range(len(classes))]
    support = [np.flatnonzero(panel["support_labels"] == k)[:1] for k in range(len(classes))]
    gain = 1.0
    if attacked:
        change = panel["adversarial"].astype(int) - panel["query"].astype(int)
        gain = float(max(1, math.floor(127 / max(1, int(np.abs(change).max())))))
    rows: list[tuple[str, str, int]] = [("support", "support", 0)]
    for shot in range(max((len(found) for found in queries), default=0)):
        rows.append(("query", "query", shot))
        if attacked:
            rows += [("adversarial", "attacked", shot), ("change", f"change × {gain:.0f}", shot)]
    cell, left, top = 1.25, 1.0, 0.45
    steps = [cell + (0.34 if kind in ("query", "adversarial") else 0.12) + 0.2 * (kind == "query") for kind, _, _ in rows]
    figure = _figure(left + cell * 1.1 * len(classes) + 0.1, top + sum(steps) + 0.1)
    offset = top
    for (kind, label, shot), step in zip(rows, steps, strict=True):
        offset += 0.2 * (kind == "query")
        for k, name in enumerate(classes):
            at = support[k][:1] if kind == "support" else queries[k][shot : shot + 1]
            box = (left + 1.1 * cell * k, offset, cell)
            if k == 0:
                _write(figure, 0.1, offset + cell / 2, label, ha="left", va="center", color=MUTED, fontsize=9.5)
            if kind == "support":
                _write(figure, box[0] + cell / 2, top - 0.12, _short(name, 16), ha="center", va="bottom", weight="bold")
            if len(at):
                _cell(figure, box, panel, kind, int(at[0]), gain)
        offset += step - 0.2 * (kind == "query")
    return _save(figure, path)


def _cell(figure: Figure, box: tuple[float, float, float], panel: Mapping, kind: str, at: int, gain: float) -> None:
    """One image, and under a query or an attacked query the predicted class."""
    if kind == "change":
        change = panel["adversarial"][at].astype(float) - panel["query"][at].astype(float)
        image = np.clip(128 + gain * change, 0, 255).astype(np.uint8)
    else:
        image = panel[kind][at]
    width, height = figure.get_size_inches()
    left, offset, side = box
    axes = figure.add_axes((left / width, 1 - (offset + side) / height, side / width, side / height))
    axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest" if image.shape[-1] < 96 else "antialiased")
    axes.set(xticks=[], yticks=[])
    guesses = {"query": "predictions", "adversarial": "adversarial_predictions"}.get(kind)
    right = None if guesses is None else bool(panel[guesses][at] == panel["query_labels"][at])
    color = GRID if right is None else RIGHT if right else WRONG
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=1.0 if right is None else 2.2)
    if right is not None:
        guess = _short(str(panel["classes"][int(panel[guesses][at])]), 14)
        text = f"{'✓' if right else '✗'} {guess}"
        _write(figure, left + side / 2, offset + side + 0.07, text, ha="center", va="top", color=color, weight="bold")


def _bars(
    axes: Axes, chosen: Mapping[str, Comparison], names: Sequence[str], models: Sequence[str], reach: float, *, first: bool
) -> None:
    thickness = 0.78 / len(models)
    factor = 100.0 if reach == 1.0 else 1.0
    for row, name in enumerate(names):
        for place, model in enumerate(models):
            cell = chosen[name].cells.get(model) if name in chosen else None
            if cell is None:
                continue
            y = row + (place - (len(models) - 1) / 2) * thickness
            axes.barh(y, factor * cell.value, height=0.9 * thickness, color=_color(model, models))
            axes.errorbar(
                factor * cell.value, y, xerr=factor * cell.ci95, color=INK, elinewidth=1.1, capsize=2.2, capthick=1.1,
            )
            axes.annotate(
                f"{factor * cell.value:.1f}" if factor > 1 else f"{cell.value:.3g}", (factor * (cell.value + cell.ci95), y),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK, annotation_clip=False,
            )
    axes.set(xlim=(0, 1.1 * factor * reach), ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)))
    _dress(axes, "")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_yticklabels([_short(name, 28) for name in names] if first else [], fontsize=9, color=INK)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if AVERAGE in names:
        axes.axhline(names.index(AVERAGE) - 0.5, color=MUTED, linewidth=0.8)
    ways = re.match(r"(\d+)-way", next(iter(chosen.values())).protocol) if chosen else None
    if ways and factor > 1:
        axes.axvline(100 / int(ways[1]), color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)), zorder=3)


def _heading(axes: Axes, chosen: Mapping[str, Comparison], condition: str, protocol: str) -> None:
    counts = sorted({cell.n for name, c in chosen.items() if name != AVERAGE for cell in c.cells.values()})
    unit = next(iter(chosen.values())).unit if chosen else "episodes"
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0]) if counts else "0"
    title = condition[:1].upper() + condition[1:]
    axes.annotate(_short(title, 38), (0, 1), xytext=(0, 20), xycoords="axes fraction", textcoords="offset points",
                  fontsize=10.5, fontweight="bold", color=INK)
    axes.annotate(f"{protocol}, n = {several} {unit}", (0, 1), xytext=(0, 7), xycoords="axes fraction",
                  textcoords="offset points", fontsize=8.5, color=MUTED)


def _legend(figure: Figure, models: Sequence[str], place: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=_color(model, models), label=model) for model in models]
    handles.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)), label="chance"))
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles), frameon=False, fontsize=9,
                  labelcolor=INK, handlelength=1.3, borderaxespad=0, columnspacing=1.6)


def _color(model: str, models: Sequence[str]) -> str:
    others = [name for name in models if name != "frozen"]
    return PALETTE[0] if model == "frozen" else PALETTE[1 + others.index(model) % (len(PALETTE) - 1)]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Exponential mean whose weights sum to one from the first value on; its memory is a twentieth of the run."""
    keep = 1 - 2 / (max(1, len(values) // 20) + 1)
    total = weight = 0.0
    smooth = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smooth[i] = total / weight
    return smooth


def _dress(axes: Axes, title: str) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, **{"fontsize": 9, "color": INK, **style})


def _short(text: str, most: int) -> str:
    """`text` for a label: at most `most` characters, and `$` kept from starting a formula."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('report: figures need matplotlib; `pip install "vismt[report]"`.') from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "vismt"})
    atomic_write(path, buffer.getvalue())
    return path
