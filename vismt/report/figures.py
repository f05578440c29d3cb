"""The pictures of a report as PNG: training curve, accuracy per domain with intervals, one episode with its attack."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vismt.errors import UserError
from vismt.jobs.fewshot.episode_figure import episode_grid
from vismt.report.comparison import AVERAGE, Comparison, is_share
from vismt.report.plotting import (
    DASHES,
    GRID,
    INK,
    MUTED,
    RIGHT,
    WRONG,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    running_mean,
    save,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["domain_bars", "episode_grid", "training_curve"]

SHOWN_COLUMNS = 3


def training_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, and accuracy where it was logged, against the step: each logged value thin, their running mean thick.

    Args:
        metrics: lines of metrics.jsonl; a value that is missing or None leaves a gap.
        path: the PNG to write.
    """
    names = [name for name in ("loss", "accuracy") if any(row.get(name) is not None for row in metrics)]
    if not names:
        raise UserError(f"training curve: none of {len(metrics)} logged lines has a loss or an accuracy.")
    figure = new_figure(8.0, 2.5 * len(names) + 0.3)
    for place, (name, color) in enumerate(zip(names, (WRONG, RIGHT))):
        axes = figure.add_subplot(len(names), 1, place + 1)
        kept = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        steps, values = (np.array(column, dtype=float) for column in zip(*kept, strict=True))
        factor = 100.0 if name == "accuracy" else 1.0
        smooth = running_mean(values) * factor
        lone = "o" if len(steps) == 1 else None
        axes.plot(steps, values * factor, color=color, alpha=0.28, linewidth=1.0, marker=lone)
        axes.plot(steps, smooth, color=color, linewidth=2.2, solid_capstyle="round")
        unit = " %" if name == "accuracy" else ""
        axes.annotate(
            f"{smooth[-1]:.3g}{unit}",
            (steps[-1], smooth[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )
        dress(axes, "Training loss" if name == "loss" else "Training accuracy (%)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.locator_params(axis="x", integer=True)
        if place == len(names) - 1:
            axes.set_xlabel("step", color=MUTED, fontsize=9)
        else:
            axes.tick_params(labelbottom=False)
    figure.tight_layout(h_pad=1.6, rect=(0, 0, 0.95, 1))
    return save(figure, path)


def domain_bars(comparisons: Sequence[Comparison], path: Path, order: Sequence[str] | None = None) -> Path:
    """One panel for each protocol and condition: a bar for each set and model, with the 95 % interval and chance level.

    Args:
        comparisons: of one metric, in the order to draw; sets run down the panel, conditions across.
        path: the PNG to write.
        order: all models of the report, which gives each its colour; None for those of these comparisons.
    """
    blocks = list(dict.fromkeys((c.protocol, c.seed) for c in comparisons))
    models = list(dict.fromkeys(model for c in comparisons for model in c.cells))
    conditions = list(dict.fromkeys(c.condition for c in comparisons))
    bands = math.ceil(len(conditions) / SHOWN_COLUMNS)
    columns = math.ceil(len(conditions) / bands)
    names = [list(dict.fromkeys(c.data for c in comparisons if (c.protocol, c.seed) == block)) for block in blocks]
    heights = [max(0.7, len(rows) * (0.2 * len(models) + 0.22)) for rows in names for _ in range(bands)]
    label = min(2.6, 0.085 * max(len(short(c.data, 28)) for c in comparisons) + 0.25)
    width, gap = 1.0 + label + columns * 3.5, 1.0
    chance = any(_chance(c) is not None for c in comparisons)
    top = 0.33 + 0.22 * legend_rows(models, width - label, chance)
    height = top + sum(heights) + gap * len(heights)
    figure = new_figure(width, height)
    colors = {model: color_of(model, models if order is None else order) for model in models}
    legend(figure, models, list(colors.values()), label, chance=chance)
    reach = (
        1.0 if is_share(comparisons[0].metric) else max(c.value + c.ci95 for x in comparisons for c in x.cells.values())
    )
    panel = (width - label - 0.35) / columns
    offset = top
    for place, rows in enumerate(heights):
        block, band = divmod(place, bands)
        offset += 0.55
        for column, condition in enumerate(conditions[band * columns : (band + 1) * columns]):
            box = (
                (label + column * panel) / width,
                1 - (offset + rows) / height,
                (panel - 0.45) / width,
                rows / height,
            )
            axes = figure.add_axes(box)
            chosen = {
                c.data: c for c in comparisons if (c.protocol, c.seed, c.condition) == (*blocks[block], condition)
            }
            _bars(axes, chosen, names[block], colors, reach, first=column == 0)
            _heading(axes, chosen, condition, blocks[block][0])
        offset += rows + gap - 0.55
    return save(figure, path)


def _bars(
    axes: Axes,
    chosen: Mapping[str, Comparison],
    names: Sequence[str],
    colors: Mapping[str, str],
    reach: float,
    *,
    first: bool,
) -> None:
    thickness = 0.78 / len(colors)
    factor = 100.0 if reach == 1.0 else 1.0
    for row, name in enumerate(names):
        for place, (model, color) in enumerate(colors.items()):
            cell = chosen[name].cells.get(model) if name in chosen else None
            if cell is None:
                continue
            y = row + (place - (len(colors) - 1) / 2) * thickness
            axes.barh(y, factor * cell.value, height=0.9 * thickness, color=color)
            axes.errorbar(
                factor * cell.value,
                y,
                xerr=factor * cell.ci95,
                color=INK,
                elinewidth=1.1,
                capsize=2.2,
                capthick=1.1,
            )
            axes.annotate(
                f"{factor * cell.value:.1f}" if factor > 1 else f"{cell.value:.3g}",
                (factor * (cell.value + cell.ci95), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=INK,
                annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=4,
            )
    cells = [cell for comparison in chosen.values() for cell in comparison.cells.values()]
    least = min((cell.value - cell.ci95 for cell in cells), default=0.0)  # below 0 only where values may be negative
    low = min(0.0, least) if reach != 1.0 else 0.0
    axes.set(xlim=(1.1 * factor * low, 1.1 * factor * reach), ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)))
    dress(axes, "")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_yticklabels([short(name, 28) for name in names] if first else [], fontsize=9, color=INK)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if AVERAGE in names:
        axes.axhline(names.index(AVERAGE) - 0.5, color=MUTED, linewidth=0.8)
    level = _chance(next(iter(chosen.values()), None))
    if level is not None:
        axes.axvline(100 * level, color=MUTED, linewidth=1.0, linestyle=DASHES, zorder=3)


def _heading(axes: Axes, chosen: Mapping[str, Comparison], condition: str, protocol: str) -> None:
    counts = sorted({cell.n for name, c in chosen.items() if name != AVERAGE for cell in c.cells.values()})
    unit = next(iter(chosen.values())).unit if chosen else "episodes"
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0]) if counts else "0"
    share = ", per cent" if chosen and is_share(next(iter(chosen.values())).metric) else ""
    title = condition[:1].upper() + condition[1:]
    axes.annotate(
        short(title, 42),
        (0, 1),
        xytext=(0, 20),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10.5 if len(title) <= 34 else 8.5,
        fontweight="bold",
        color=INK,
    )
    axes.annotate(
        f"{protocol}, n = {several} {unit}{share}",
        (0, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=MUTED,
    )


def _chance(comparison: Comparison | None) -> float | None:
    """1 / N of an "N-way ..." protocol whose metric is accuracy."""
    if comparison is None or not comparison.metric.lower().endswith("accuracy"):
        return None
    ways = re.match(r"(\d+)-way\b", comparison.protocol)
    return 1 / int(ways[1]) if ways and int(ways[1]) else None
