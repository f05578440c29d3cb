"""Pictures of a study with arms: a score by arm and seed, and the training of the arms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vismt.base.errors import UserError
from vismt.report.comparison import Comparison
from vismt.report.plotting import (
    INK,
    MUTED,
    NARROW,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    one_panel,
    running_mean,
    save_figure,
    short,
    write,
    write_note,
)
from vismt.report.tables import typographic
from vismt.uncertainty.intervals import SHARE, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = ("accuracy", "robust")  # logged in [0, 1] and drawn in per cent
_WIDEST, LETTER = 6.4, 0.076  # inches: width of a figure, and of a letter of 8.5 points


@dataclass(frozen=True)
class SeedsPanel:
    """One score with what its panel shows: name, metric, number of examples, scale, and values by (arm, seed).

    The values are as they are drawn, with shares in per cent.
    """

    title: str
    metric: str
    count: str
    values: Mapping[tuple[str, int], float]
    scale: Scale


def seeds_figure(panels: Sequence[SeedsPanel], arms: Sequence[str], path: Path) -> Path:
    """Draw the arms side by side in every panel, and return `path`.

    Each seed has a dot. The mean of an arm has a bar and its number. Dots of one seed are joined, because arms of a seed are
    paired. An arm without a value leaves its place empty.
    """
    names = [short(arm, 18) for arm in arms]
    longest = max(map(len, names)) * LETTER
    upright = (longest + 0.1) * len(arms) > 2.8
    size = (len(arms) * max(0.42, 1.9 / len(arms), 0 if upright else longest + 0.1), 1.5)
    head, pitch, below = 0.72, size[0] + 0.65, (longest if upright else 0.15) + 0.08
    down = math.ceil(len(panels) / max(1, int((_WIDEST - 0.2) // pitch)))
    columns = math.ceil(len(panels) / down)
    figure = new_figure(0.2 + columns * pitch, down * (size[1] + head + 0.12) + below)
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left, top = 0.55 + column * pitch, head + row * (size[1] + head + 0.12)
        write(figure, left, top - 0.49, short(panel.title, 22), fontsize=10.5, weight="bold")
        room = max(6, int((pitch - 0.1) / LETTER) - len(panel.count) - 2)
        write(figure, left, top - 0.31, f"{short(panel.metric, room)}, {panel.count}", fontsize=8.5, color=MUTED)
        axes = axes_at(figure, left, top, *size)
        _seeds(axes, panel, arms)
        axes.tick_params(labelbottom=place + columns >= len(panels))
        axes.set_xticks(range(len(arms)), names, rotation=90 if upright else 0, color=INK)
    return save_figure(figure, path)


def _seeds(axes: Axes, panel: SeedsPanel, arms: Sequence[str]) -> None:
    table = panel.values
    seeds, colors = list(dict.fromkeys(seed for _, seed in table)), [color_of(arm, arms) for arm in arms]
    for place, seed in enumerate(seeds):
        shift = 0.3 * ((place + 0.5) / len(seeds) - 0.5)  # so that equal dots do not hide one another
        values = [table.get((arm, seed), math.nan) for arm in arms]
        at = [number + shift for number in range(len(arms))]
        axes.plot(at, values, color=MUTED, alpha=0.45, linewidth=0.8, zorder=1)
        axes.scatter(at, values, color=colors, s=16, zorder=3, edgecolor="white", linewidth=0.5)
    for number, (arm, color) in enumerate(zip(arms, colors, strict=True)):
        of_arm = [value for (name, _), value in table.items() if name == arm]
        if of_arm:
            mean = math.fsum(of_arm) / len(of_arm)
            axes.plot([number - 0.32, number + 0.32], [mean] * 2, color=color, linewidth=2.4, alpha=0.75, zorder=2)
            text = typographic(format(mean, ".1f" if panel.scale == SHARE else ".3g"))
            style = {"ha": "center", "fontsize": 8.5, "fontweight": "bold"}
            write_note(axes, text, (number, 1), (0, 6), ("data", "axes fraction"), **style)
    dress(axes, "", grid="y")
    axes.set(xlim=(-0.5, len(arms) - 0.5), ymargin=0.09)
    axes.locator_params(axis="y", nbins=5)


def cost_figure(c: Comparison, costs: Mapping[str, float], names: tuple[str, str], path: Path) -> Path:
    """Draw a dot for each model at its cost and its score with the 95 % interval.

    names: Names of the score and of the cost.
    """
    figure, axes = one_panel(list(costs), [color_of(arm, list(c.cells)) for arm in costs], short(names[0], 33))
    factor, alike = 100 if c.row.scale == SHARE else 1, Counter(costs.values())
    low, high = min(costs.values()), max(costs.values())
    wide = low > 0 and high > 20 * low
    for number, (arm, cost) in enumerate(costs.items()):
        cell = c.cells[arm]
        place = number - (len(costs) - 1) / 2 if alike[cost] > 1 else 0.0  # models of the same cost stand side by side
        axes.errorbar(
            cost * 1.2**place if wide else cost + 0.04 * place * (high - low),
            factor * cell.value,
            yerr=[[factor * max(0.0, cell.value - cell.low)], [factor * max(0.0, cell.high - cell.value)]],
            color=color_of(arm, list(c.cells)),
            fmt="o",
            elinewidth=1.2,
            capsize=2.5,
        )
    axes.margins(x=0.15)
    if wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=3)
        if high >= 1000:
            axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(names[1], color=MUTED, fontsize=9)
    return save_figure(figure, path)


def pairs_figure(pairs: Mapping[str, tuple[float, float, float]], scale: str, title: str, path: Path) -> Path:
    """Draw a dot with its 95 % interval for each difference, and a line at 0.

    pairs: Difference, low and high by name.
    """
    factor, left, names = 100 if scale == SHARE else 1, 1.75, list(pairs)
    figure = new_figure(NARROW, 0.9 + 0.3 * len(names))
    axes = axes_at(figure, left, 0.45, NARROW - left - 0.2, 0.3 * len(names))
    for place, (value, low, high) in enumerate(pairs.values()):
        reach = [[factor * (value - low)], [factor * (high - value)]]
        color = MUTED if low <= 0 <= high else color_of("", [""])
        axes.errorbar(factor * value, -place, xerr=reach, color=color, fmt="o", capsize=2.5)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    dress(axes, short(title, 44), grid="x")
    axes.set(ylim=(0.6 - len(names), 0.4))
    axes.set_yticks([-place for place in range(len(names))], [short(name, 22) for name in names], fontsize=9)
    axes.locator_params(axis="x", nbins=4)
    return save_figure(figure, path)


def rates_figure(scores: Mapping[str, Mapping[float, float]], path: Path) -> Path:
    """Draw a line for each arm through its validation scores by learning rate.

    scores: Score by arm and rate.
    """
    arms = list(scores)
    figure, axes = one_panel(arms, [color_of(arm, arms) for arm in arms], "Validation score")
    for arm, by_rate in scores.items():
        rates = sorted(by_rate)
        axes.plot(rates, [by_rate[rate] for rate in rates], color=color_of(arm, arms), marker="o", markersize=4)
    axes.set_xscale("log")
    axes.minorticks_off()
    shown = sorted({rate for by_rate in scores.values() for rate in by_rate})
    shown = shown[:: math.ceil(len(shown) / 4)]
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.set_xlabel("learning rate", color=MUTED, fontsize=9)
    return save_figure(figure, path)


def curves_figure(logs: Mapping[str, Sequence[Mapping[str, object]]], titles: Mapping[str, str], path: Path) -> Path:
    """Draw what was logged against the step: a panel for each logged entry of `titles`, and a line for each arm.

    logs: Lines of metrics.jsonl by arm. A value that is missing or None leaves a gap. Thin lines are the logged values, thick
    lines the running mean. titles: {name in the log: title}. Shares ("accuracy", "robust") are drawn in per cent, and "fade"
    low and dashed. Raise UserError if nothing but the fade was logged.
    """
    series: dict[str, dict[str, np.ndarray]] = {}  # logged (step, value) pairs (logged, 2) by name and arm
    for name in titles:
        pairs = {
            arm: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for arm, rows in logs.items()
        }
        series[name] = {arm: np.array(found, dtype=float) for arm, found in pairs.items() if found}
    shown = [name for name in titles if series[name]]
    if not set(shown) - {"fade"}:
        raise UserError(f"training curves: none of {', '.join(logs)} has logged a loss or an accuracy.")
    arms, left, width = list(logs), 0.6, NARROW
    heights = [0.6 if name == "fade" else 1.9 if len(shown) < 5 else 1.4 for name in shown]
    offset = 0.12 + 0.22 * legend_rows(arms, width - left)
    figure = new_figure(width, offset + sum(heights) + 0.45 * len(shown) + 0.4)
    legend(figure, [short(arm, 40) for arm in arms], [color_of(arm, arms) for arm in arms], left)
    last = max(line[-1, 0] for lines in series.values() for line in lines.values())
    for name, height in zip(shown, heights, strict=True):
        axes = axes_at(figure, left, offset + 0.4, width - left - 0.2, height)
        offset += height + 0.45
        dress(axes, titles[name], grid="y")
        axes.set(xlim=(0, 1.01 * last))
        axes.locator_params(axis="x", integer=True)
        if name != shown[-1]:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("step", color=MUTED, fontsize=9)
        for number, (arm, line) in enumerate(series[name].items()):
            color, (steps, values) = color_of(arm, arms), line.T
            if name == "fade":  # arms with one schedule take turns, so that each is seen
                turn = (3 * number, (3, 3 * max(1, len(series[name]) - 1)))
                axes.plot(steps, values, color=color, linewidth=1.2, linestyle=turn)
                axes.set(ylim=(-0.08, 1.08), yticks=(0, 1))
                continue
            factor, lone = 100.0 if name in SHARES else 1.0, "o" if len(steps) == 1 else None
            axes.plot(steps, factor * values, color=color, alpha=0.18, linewidth=0.8, marker=lone, zorder=1.5)
            few = "o" if len(steps) <= 20 else None
            axes.plot(steps, factor * running_mean(values), color=color, linewidth=1.8, marker=few, markersize=3)
    return save_figure(figure, path)
