"""The pictures that every report shares: scores by set with intervals, and scores against the level of a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.report.comparison import AVERAGE, Comparison
from vismt.report.plotting import (
    DASHES,
    INK,
    MUTED,
    PALETTE,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    save_figure,
    short,
    write_note,
)
from vismt.report.tables import number_text
from vismt.uncertainty.intervals import SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3


def domain_bars(comparisons: Sequence[Comparison], path: Path, order: Sequence[str] | None = None) -> Path:
    """Draw a panel for each block and condition: a bar for each set and arm, with the 95 % interval and chance level.

    comparisons: Comparisons of one metric, in the order to draw. Panels are below each other, so that a narrow screen has room.
    order: All arms of the report, which gives each its colour. None for the arms of these comparisons.
    """
    arms = list(dict.fromkeys(arm for c in comparisons for arm in c.cells))
    panels: dict[tuple[object, str], dict[str, Comparison]] = {}
    for c in comparisons:
        panels.setdefault((c.block, c.condition), {})[c.data] = c
    heights = [max(0.7, len(panel) * (0.2 * len(arms) + 0.22)) for panel in panels.values()]
    label = min(2.6, 0.085 * max(len(short(c.data, 28)) for c in comparisons) + 0.25)
    width, gap = label + 3.7, 1.0
    chance = any(_chance(c) is not None for c in comparisons)
    top = 0.33 + 0.22 * legend_rows(arms, width - label, chance)
    figure = new_figure(width, top + sum(heights) + gap * len(heights))
    colors = {arm: color_of(arm, arms if order is None else order) for arm in arms}
    legend(figure, arms, list(colors.values()), label, chance=chance)
    reach = 1.0
    if comparisons[0].row.scale != SHARE:
        reach = max(cell.high for c in comparisons for cell in c.cells.values())
    offset = top
    for ((_, condition), chosen), rows in zip(panels.items(), heights, strict=True):
        axes = axes_at(figure, label, offset + 0.55, 3.1, rows)
        _bars(axes, chosen, colors, reach)
        _heading(axes, chosen, condition)
        offset += rows + gap
    return save_figure(figure, path)


def _bars(axes: Axes, chosen: Mapping[str, Comparison], colors: Mapping[str, str], reach: float) -> None:
    names = list(chosen)
    thickness = 0.78 / len(colors)
    scale = next(iter(chosen.values())).row.scale
    factor = 100.0 if scale == SHARE else 1.0
    for row, name in enumerate(names):
        for place, (arm, color) in enumerate(colors.items()):
            cell = chosen[name].cells.get(arm)
            if cell is None:
                continue
            y = row + (place - (len(colors) - 1) / 2) * thickness
            axes.barh(y, factor * cell.value, height=0.9 * thickness, color=color)
            axes.errorbar(
                factor * cell.value,
                y,
                xerr=[[factor * max(0.0, cell.value - cell.low)], [factor * max(0.0, cell.high - cell.value)]],
                color=INK,
                elinewidth=1.1,
                capsize=2.2,
                capthick=1.1,
            )
            text = number_text(cell.value, scale, half=(cell.high - cell.low) / 2)
            style = {"va": "center", "fontsize": 8.5, "zorder": 4, "annotation_clip": False}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            write_note(axes, text, (factor * cell.high, y), (4, 0), bbox=box, **style)
    cells = [cell for comparison in chosen.values() for cell in comparison.cells.values()]
    least = min((cell.low for cell in cells), default=0.0)  # below 0 only if values may be negative
    low = 0.0 if scale == SHARE else min(0.0, least)
    axes.set(xlim=(1.1 * factor * low, 1.1 * factor * reach), ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)))
    dress(axes, "", grid="x")
    axes.set_yticklabels([short(name, 28) for name in names], fontsize=9, color=INK)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if AVERAGE in names[1:]:
        axes.axhline(names.index(AVERAGE) - 0.5, color=MUTED, linewidth=0.8)
    level = _chance(next(iter(chosen.values())))
    if level is not None:
        axes.axvline(100 * level, color=MUTED, linewidth=1.0, linestyle=DASHES, zorder=3)


def _heading(axes: Axes, chosen: Mapping[str, Comparison], condition: str) -> None:
    row = next(iter(chosen.values())).row
    counted = [c for name, c in chosen.items() if name != AVERAGE or len(chosen) == 1]
    counts = sorted({cell.n for c in counted for cell in c.cells.values()})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    share = ", per cent" if row.scale == SHARE else ""
    title = condition[:1].upper() + condition[1:]
    style = {"fontsize": 10.5 if len(title) <= 34 else 8.5, "fontweight": "bold"}
    write_note(axes, short(title, 42), (0, 1), (0, 20), "axes fraction", **style)
    count = f", n = {several} {row.unit}{share}"
    text = short(row.protocol, 54 - len(count)) + count  # the table has the whole protocol
    write_note(axes, text, (0, 1), (0, 7), "axes fraction", fontsize=8.5, color=MUTED)


def _chance(comparison: Comparison) -> float | None:
    """Return the score of a guess, in [0, 1]. Return None for scores that are not shares."""
    return comparison.row.chance if comparison.row.scale == SHARE else None


def level_curves(comparisons: Sequence[Comparison], path: Path, level: str) -> Path:
    """Draw a panel for each family of conditions: the score against the level, a line with 95 % intervals for each arm.

    Several families are followed by a panel of their mean, without a width, because they share their examples.

    comparisons: Comparisons of one block and set (or average), under conditions with a level. A clean condition counts as level
    0. level: Name of the axis.
    """
    arms = list(dict.fromkeys(arm for c in comparisons for arm in c.cells))
    families = list(dict.fromkeys(c.row.family for c in comparisons if c.row.level is not None))
    clean = [c for c in comparisons if c.row.level is None]
    curves = {
        family: {arm: _by_level([*clean, *(c for c in comparisons if c.row.family == family)], arm) for arm in arms}
        for family in families
    }
    if len(curves) > 1:
        mean: dict[str, dict[float, tuple[float, float, float]]] = {}
        for arm in arms:
            lines = [panel[arm] for panel in curves.values()]
            shared = [at for at in lines[0] if all(at in line for line in lines)]
            values = {at: math.fsum(line[at][0] for line in lines) / len(lines) for at in shared}
            mean[arm] = {at: (value, value, value) for at, value in values.items()}
        curves[f"mean of {len(curves)}"] = mean
    levels = sorted({at for panel in curves.values() for line in panel.values() for at in line})
    columns, size = min(ACROSS, len(curves)), (2.2, 1.55)
    down = math.ceil(len(curves) / columns)
    left, width = 0.55, 0.55 + max(columns * size[0], 4.4)
    top = 0.3 + 0.22 * legend_rows(arms, width - left)
    figure = new_figure(width, top + down * (size[1] + 0.45) + 0.25)
    legend(figure, arms, [color_of(arm, arms) for arm in arms], left)
    step = min((b - a for a, b in pairwise(levels)), default=1.0)
    factor = 100 if comparisons[0].row.scale == SHARE else 1
    highest = max(factor * high for panel in curves.values() for line in panel.values() for _, _, high in line.values())
    for place, (name, panel) in enumerate(curves.items()):
        row, column = divmod(place, columns)
        at = (left + column * size[0], top + 0.3 + row * (size[1] + 0.45))
        axes = axes_at(figure, *at, size[0] - 0.25, size[1])
        for number, (arm, line) in enumerate(panel.items()):
            shift = 0.5 * step * ((number + 0.5) / len(panel) - 0.5)  # so that whiskers do not overlap
            widths = [[factor * max(0.0, value - low) for value, low, _ in line.values()]]
            widths += [[factor * max(0.0, high - value) for value, _, high in line.values()]]
            axes.errorbar(
                [position + shift for position in line],
                [factor * value for value, _, _ in line.values()],
                yerr=widths if any(map(any, widths)) else None,
                color=color_of(arm, arms),
                linewidth=1.6,
                elinewidth=0.8,
                marker="o",
                markersize=3.2,
            )
        dress(axes, name.replace("_", " "), grid="y")
        axes.set(xlim=(levels[0] - 0.3 * step, levels[-1] + 0.3 * step), ylim=(0, 1.05 * highest or 1.0))
        axes.set_xticks(levels, [f"{position:.3g}" for position in levels])
        axes.tick_params(labelleft=column == 0, labelbottom=place + columns >= len(curves))
        if place + columns >= len(curves):
            axes.set_xlabel(level, color=MUTED, fontsize=9)
    return save_figure(figure, path)


def _by_level(comparisons: Sequence[Comparison], arm: str) -> dict[float, tuple[float, float, float]]:
    """Return an arm's (value, low, high) by level, ascending."""
    cells = {c.row.level or 0.0: c.cells.get(arm) for c in comparisons}
    return {level: (cell.value, cell.low, cell.high) for level, cell in sorted(cells.items()) if cell is not None}


def certified_figure(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Draw a panel for each arm: what is proved for its smoothed classifiers, and what attacks break of the classifier itself.

    comparisons: Comparisons of one block and set (or average), certified and, if there are any, clean and under attacks in l2.
    """
    certified = list(dict.fromkeys(c.row.family for c in comparisons if c.row.kind == "certified"))
    attacks = list(dict.fromkeys(c.row.family for c in comparisons if c.row.kind == "attack"))
    clean = [c for c in comparisons if c.row.kind == "clean"]
    arms = list(dict.fromkeys(arm for c in comparisons if c.row.kind == "certified" for arm in c.cells))
    names = [*(f"{family}, certified" for family in certified), *(f"itself, {family}" for family in attacks)]
    size, left = (2.6, 1.9), 0.55
    width = left + max(len(arms) * size[0], 4.6)
    top = 0.3 + 0.22 * legend_rows(names, width - left)
    figure = new_figure(width, top + size[1] + 0.75)
    colors = [PALETTE[1 + place % (len(PALETTE) - 1)] for place in range(len(names))]
    legend(figure, names, colors, left)
    for column, arm in enumerate(arms):
        axes = axes_at(figure, left + column * size[0], top + 0.3, size[0] - 0.3, size[1])
        for family, color in zip((*certified, *attacks), colors, strict=True):
            proved = family in certified
            of_family = [c for c in comparisons if c.row.family == family]
            line = _by_level(of_family if proved else [*clean, *of_family], arm)
            values = [100 * value for value, _, _ in line.values()]
            widths = [[100 * (value - low) for value, low, _ in line.values()]]
            widths += [[100 * (high - value) for value, _, high in line.values()]]
            # Between two radii, what holds at the larger radius is proved, and no more.
            style: dict[str, Any] = {"ls": "-", "drawstyle": "steps-pre"} if proved else {"ls": DASHES}
            axes.errorbar(list(line), values, widths, color=color, marker="o", markersize=3.2, **style)
            if proved:
                axes.fill_between(list(line), values, step="pre", color=color, alpha=0.15, linewidth=0)
        dress(axes, short(arm, 26), grid="y")
        axes.set_ylim(0, 100)
        axes.set_xlabel("l2 radius", color=MUTED, fontsize=9)
        axes.tick_params(labelleft=column == 0)
    return save_figure(figure, path)
