"""The pictures of a pool and of corruptions: training curves of each expert, mixture per domain, accuracy by severity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vismt.errors import UserError
from vismt.report.comparison import Comparison
from vismt.report.plotting import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    running_mean,
    save,
    short,
    write,
)
from vismt.robustness.conditions import SEVERITIES, corruption

QUANTITIES = {"loss": "Loss", "accuracy": "Accuracy (%)", "robust": "Accuracy under attack (%)"}
LINES = {"loss": PALETTE[2], "accuracy": PALETTE[1], "robust": PALETTE[3]}
ACROSS = 4


def expert_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """A row for each expert, a column for each of loss, accuracy and accuracy under attack that any of them logged.

    Args:
        logs: lines of metrics.jsonl by expert; a value that is missing or None leaves a gap. Columns share their scale.
        path: the PNG to write.
    """
    names = [name for name in QUANTITIES if any(row.get(name) is not None for rows in logs.values() for row in rows)]
    if not names:
        raise UserError(f"expert curves: none of {', '.join(logs)} has logged a loss or an accuracy.")
    label, width, height, top = 1.45, 3.1, 1.15, 0.45
    step = height + 0.3
    figure = new_figure(label + width * len(names) + 0.05, top + step * len(logs) + 0.4)
    for column, name in enumerate(names):
        factor = 1.0 if name == "loss" else 100.0
        series = {key: _series(rows, name, factor) for key, rows in logs.items()}
        reach = [value for _, values in series.values() for value in values]
        low, high = (0.0, 100.0) if factor > 1 else (min(reach), max(reach))
        edge = 0.06 * (high - low) or 0.5
        last = max((steps[-1] for steps, _ in series.values() if len(steps)), default=1.0)
        for row, (key, (steps, values)) in enumerate(series.items()):
            at = (label + width * column, top + step * row)
            axes = axes_at(figure, *at, width - 0.85, height)
            dress(axes, QUANTITIES[name] if row == 0 else "")
            axes.set(xlim=(0, 1.02 * last), ylim=(low - edge, high + edge))
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", integer=True, nbins=5)
            if row < len(logs) - 1:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel("step", color=MUTED, fontsize=9)
            if column == 0:
                write(
                    figure, 0.1, at[1] + height / 2, short(key, 13), ha="left", va="center", fontsize=10, weight="bold"
                )
            if not len(steps):
                axes.annotate("not logged", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED, fontsize=9)
                continue
            smooth = running_mean(values)
            axes.plot(
                steps, values, color=LINES[name], alpha=0.28, linewidth=1.0, marker="o" if len(steps) == 1 else None
            )
            axes.plot(steps, smooth, color=LINES[name], linewidth=2.0, solid_capstyle="round")
            axes.annotate(
                f"{smooth[-1]:.3g}",
                (steps[-1], smooth[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=LINES[name],
                fontsize=9,
                fontweight="bold",
                annotation_clip=False,
            )
    return save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], name: str, factor: float) -> tuple[np.ndarray, np.ndarray]:
    kept = [(float(row["step"]), factor * float(row[name])) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept])


def mixture_bars(
    shares: Mapping[str, Mapping[tuple[str, str], Sequence[float]]], labels: Sequence[str], path: Path
) -> Path:
    """A panel for each model, in it a bar for each set: the mean weight of each expert, side by side to 100 %.

    Args:
        shares: by model and (set, what to write behind it, such as n), the weights (P,) with sum 1.
        labels: of the P experts.
        path: the PNG to write.
    """
    sets = max(map(len, shares.values()))
    label = 0.078 * max(len(_row(*key)) for panel in shares.values() for key in panel) + 0.3
    width, rows = label + 6.0, 0.34 * sets + 0.12
    colors = [color_of(str(number), [str(at) for at in range(len(labels))]) for number in range(len(labels))]
    top = 0.33 + 0.22 * legend_rows(labels, width - label)
    figure = new_figure(width, top + len(shares) * (rows + 0.75) + 0.1)
    legend(figure, labels, colors, label)
    for place, (model, panel) in enumerate(shares.items()):
        offset = top + 0.35 + place * (rows + 0.75)
        axes = axes_at(figure, label, offset, 5.75, rows)
        for row, weights in enumerate(panel.values()):
            left = 0.0
            for color, weight in zip(colors, weights, strict=True):
                axes.barh(row, 100 * weight, left=left, height=0.72, color=color, edgecolor="white", linewidth=0.8)
                if weight >= 0.07:
                    axes.annotate(
                        f"{100 * weight:.0f}",
                        (left + 50 * weight, row),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if _dark(color) else INK,
                        fontweight="bold",
                    )
                left += 100 * weight
        axes.set(xlim=(0, 100), ylim=(len(panel) - 0.5, -0.5), yticks=range(len(panel)))
        dress(axes, short(model, 40))
        axes.spines["bottom"].set_visible(False)
        axes.set_yticklabels([_row(*key) for key in panel], fontsize=9, color=INK)
        axes.tick_params(length=0, labelbottom=place == len(shares) - 1)
    return save(figure, path)


def _row(data: str, note: str) -> str:
    return f"{short(data, 24)}, {note}"


def _dark(color: str) -> bool:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 160


def corruption_curves(comparisons: Sequence[Comparison], path: Path) -> Path:
    """A panel for each corruption, accuracy against severity, a line with 95 % intervals for each model; last their mean.

    Args:
        comparisons: of one protocol and set (or average), of which those under a corruption are drawn.
        path: the PNG to write.
    """
    found: dict[str, dict[int, Comparison]] = {}
    for one in comparisons:
        named = corruption(one.condition)
        if named is not None:
            found.setdefault(named[0], {})[named[1]] = one
    if not found:
        raise UserError("corruption curves: no condition is a corruption.")
    models = list(dict.fromkeys(model for panel in found.values() for one in panel.values() for model in one.cells))
    curves = {name: {model: _by_severity(panel, model) for model in models} for name, panel in found.items()}
    if len(found) > 1:
        curves[f"mean of {len(found)}"] = {
            model: _mean([panel[model] for panel in curves.values()]) for model in models
        }
    columns, size = min(ACROSS, len(curves)), (2.2, 1.55)
    down = math.ceil(len(curves) / columns)
    left, width = 0.55, 0.55 + max(columns * size[0], 4.4)
    top = 0.3 + 0.22 * legend_rows(models, width - left)
    figure = new_figure(width, top + down * (size[1] + 0.45) + 0.25)
    legend(figure, models, [color_of(model, models) for model in models], left)
    highest = max(
        100 * (value + half) for panel in curves.values() for line in panel.values() for value, half in line.values()
    )
    for place, (name, panel) in enumerate(curves.items()):
        row, column = divmod(place, columns)
        at = (left + column * size[0], top + 0.3 + row * (size[1] + 0.45))
        axes = axes_at(figure, *at, size[0] - 0.25, size[1])
        for number, (model, line) in enumerate(panel.items()):
            beside = 0.5 * ((number + 0.5) / len(panel) - 0.5)  # so that whiskers do not lie on one another
            values = [100 * value for value, _ in line.values()]
            halves = [100 * half for _, half in line.values()]
            axes.errorbar(
                [severity + beside for severity in line],
                values,
                yerr=halves if any(halves) else None,
                color=color_of(model, models),
                linewidth=1.6,
                elinewidth=0.8,
                marker="o",
                markersize=3.2,
            )
        dress(axes, name.replace("_", " "))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set(xlim=(0.7, 5.3), xticks=SEVERITIES, ylim=(0, 1.05 * highest or 1.0))
        axes.tick_params(labelleft=column == 0, labelbottom=place + columns >= len(curves))
        if place + columns >= len(curves):
            axes.set_xlabel("severity", color=MUTED, fontsize=9)
    return save(figure, path)


def _by_severity(panel: Mapping[int, Comparison], model: str) -> dict[int, tuple[float, float]]:
    cells = {severity: panel[severity].cells.get(model) for severity in sorted(panel)}
    return {severity: (cell.value, cell.ci95) for severity, cell in cells.items() if cell is not None}


def _mean(lines: Sequence[Mapping[int, tuple[float, float]]]) -> dict[int, tuple[float, float]]:
    """Over corruptions at the severities that all have; without a width, as they share their episodes."""
    shared = [severity for severity in SEVERITIES if lines and all(severity in line for line in lines)]
    return {severity: (math.fsum(line[severity][0] for line in lines) / len(lines), 0.0) for severity in shared}
