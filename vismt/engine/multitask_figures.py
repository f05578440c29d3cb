"""The pictures of a multi-task run: seeds by arm, training of the arms, examples with answers, and where routers look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vismt.engine.canvas import (
    GRID,
    INK,
    MUTED,
    RIGHT,
    WRONG,
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
from vismt.engine.multitask_panels import read_panel
from vismt.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "mean over tasks"
CURVES = {"ce": "Training cross-entropy", "loss": "Training loss", "accuracy": "Training accuracy (%)", "fade": "Router fade"}
WIDEST, LETTER = 9.5, 0.076  # inches: of a figure, and of a letter of 8.5 points
SHOWN = 8


# ---- accuracy by arm and seed
def seeds_figure(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """A panel for each task and for their mean: arms side by side, a dot for each seed, a bar and the number of their mean.

    Args:
        lines: of seeds.jsonl; of these the clean ones are drawn. Dots of one seed are joined: arms of a seed are paired.
        path: the PNG to write. With one task there is no panel of the mean.
    """
    clean = [line for line in lines if line.get("condition") == "clean"]
    if not clean:
        raise UserError(f"seeds: none of {len(lines)} lines is of the clean images; evaluate the run again.")
    tables, counts = _by_task(clean)
    arms = list(dict.fromkeys(line["arm"] for line in clean))
    names = [short(arm, 18) for arm in arms]
    longest = max(map(len, names)) * LETTER
    upright = (longest + 0.1) * len(arms) > 2.8
    size = (len(arms) * max(0.42, 1.9 / len(arms), 0 if upright else longest + 0.1), 1.5)
    head, pitch, below = 0.72, size[0] + 0.65, (longest if upright else 0.15) + 0.08
    down = math.ceil(len(tables) / max(1, int((WIDEST - 0.2) // pitch)))
    columns = math.ceil(len(tables) / down)
    figure = new_figure(0.2 + columns * pitch, down * (size[1] + head + 0.12) + below)
    for place, (task, table) in enumerate(tables.items()):
        row, column = divmod(place, columns)
        left, top = 0.55 + column * pitch, head + row * (size[1] + head + 0.12)
        told = f"n = {' to '.join(f'{n:,}' for n in counts[task])} images" if task in counts else f"{len(counts)} tasks"
        write(figure, left, top - 0.49, short(task, 22), fontsize=10.5, weight="bold")
        write(figure, left, top - 0.31, f"accuracy (%), {told}", fontsize=8.5, color=MUTED)
        axes = axes_at(figure, left, top, *size)
        _seeds(axes, table, arms)
        axes.tick_params(labelbottom=place + columns >= len(tables))
        axes.set_xticks(range(len(arms)), names, rotation=90 if upright else 0, color=INK)
    return save(figure, path)


def _by_task(clean: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[tuple[Any, Any], float]], dict[str, list[int]]]:
    """Per cent by task, arm and seed, the mean over tasks last where all tasks have it; and the numbers of images."""
    tables: dict[str, dict[tuple[Any, Any], float]] = {}
    found: dict[str, set[int]] = {}
    try:
        for line in clean:
            tables.setdefault(line["data"], {})[line["arm"], line["seed"]] = 100 * line["value"]
            found.setdefault(line["data"], set()).add(line["n"])
    except (KeyError, TypeError) as error:
        raise UserError(f"seeds: a line is not what a run writes ({error!r}); evaluate the run again.") from error
    if len(tables) > 1:
        shared = [key for key in next(iter(tables.values())) if all(key in table for table in tables.values())]
        mean = {key: math.fsum(table[key] for table in tables.values()) / len(tables) for key in shared}
        tables |= {MEAN: mean} if mean else {}
    return tables, {task: sorted({min(numbers), max(numbers)}) for task, numbers in found.items()}


def _seeds(axes: Axes, table: Mapping[tuple[Any, Any], float], arms: Sequence[str]) -> None:
    seeds = list(dict.fromkeys(seed for _, seed in table))
    for place, seed in enumerate(seeds):
        beside = 0.3 * ((place + 0.5) / len(seeds) - 0.5)  # so that equal dots do not hide one another
        values = [table.get((arm, seed), math.nan) for arm in arms]
        at = [number + beside for number in range(len(arms))]
        axes.plot(at, values, color=MUTED, alpha=0.45, linewidth=0.8, zorder=1)
        axes.scatter(at, values, color=[color_of(arm, arms) for arm in arms], s=16, zorder=3, edgecolor="white", linewidth=0.5)
    for number, arm in enumerate(arms):
        own = [value for (name, _), value in table.items() if name == arm]
        if own:
            mean = math.fsum(own) / len(own)
            axes.plot([number - 0.32, number + 0.32], [mean] * 2, color=color_of(arm, arms), linewidth=2.4, alpha=0.75, zorder=2)
            axes.annotate(f"{mean:.1f}", (number, 1), xycoords=("data", "axes fraction"), xytext=(0, 6), color=INK,
                          textcoords="offset points", ha="center", fontsize=8, fontweight="bold")
    dress(axes, "")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set(xlim=(-0.5, len(arms) - 0.5), ymargin=0.09)
    axes.locator_params(axis="y", nbins=5)


# ---- training
def curves_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Cross-entropy (the loss where it was not logged), accuracy and fade against the step, a line for each arm.

    Args:
        logs: lines of metrics.jsonl by arm; a value that is missing or None leaves a gap. Thin: as logged; thick: running mean.
        path: the PNG to write.
    """
    series = {name: {arm: line for arm, rows in logs.items() if len(line := _series(rows, name))} for name in CURVES}
    shown = [name for name in CURVES if series[name] and not (name == "loss" and series["ce"])]
    if not set(shown) - {"fade"}:
        raise UserError(f"training curves: none of {', '.join(logs)} has logged a loss or an accuracy.")
    arms, left, width = list(logs), 0.6, 8.0
    heights = [0.6 if name == "fade" else 1.9 for name in shown]
    offset = 0.12 + 0.22 * legend_rows(arms, width - left)
    figure = new_figure(width, offset + sum(heights) + 0.45 * len(shown) + 0.4)
    legend(figure, [short(arm, 40) for arm in arms], [color_of(arm, arms) for arm in arms], left)
    last = max(line[-1, 0] for lines in series.values() for line in lines.values())
    for name, height in zip(shown, heights, strict=True):
        axes = axes_at(figure, left, offset + 0.4, width - left - 0.2, height)
        offset += height + 0.45
        dress(axes, CURVES[name])
        axes.set(xlim=(0, 1.01 * last))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
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
            factor, lone = 100.0 if name == "accuracy" else 1.0, "o" if len(steps) == 1 else None
            axes.plot(steps, factor * values, color=color, alpha=0.18, linewidth=0.8, marker=lone, zorder=1.5)
            axes.plot(steps, factor * running_mean(values), color=color, linewidth=1.8, solid_capstyle="round")
    return save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """(logged, 2): step and value."""
    return np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], dtype=float)


# ---- examples
def examples_figure(panel: Path, path: Path) -> Path:
    """A band for each task: its images, the true class above, and below a line for each arm's answer, ✓ right or ✗ wrong.

    Args:
        panel: the file of `write_examples`; at most 8 images of a task are drawn. Raises UserError for another file.
        path: the PNG to write. An answer of another task is named with it.
    """
    found = read_panel(panel, "examples")
    arms, tasks = found["arms"].tolist(), found["tasks"].tolist()
    bands = {task: np.flatnonzero(found["tasks"] == task)[:SHOWN].tolist() for task in dict.fromkeys(tasks)}
    truth, *answers = (
        [short(name.removeprefix(f"{task}/"), 15) for task, name in zip(tasks, line)]
        for line in (found["truth"].tolist(), *found["predictions"].tolist())
    )
    cell, pitch, line, band = 1.2, 1.42, 0.19, 0.32
    left = max(0.8, LETTER * min(18, max(map(len, arms))) + 0.3)
    height = band + 0.25 + cell + 0.12 + line * len(arms) + 0.15
    figure = new_figure(left + pitch * max(map(len, bands.values())) + 0.1, height * len(bands) + 0.1)
    for number, (task, chosen) in enumerate(bands.items()):
        top = number * height
        write(figure, 0.1, top + band, short(task, 60), fontsize=10.5, weight="bold", va="bottom")
        below = top + band + 0.25 + cell + 0.12
        for row, arm in enumerate(arms):
            write(figure, 0.1, below + row * line, short(arm, 18), va="top", color=MUTED, fontsize=8.5)
        for column, i in enumerate(chosen):
            x = left + pitch * column
            write(figure, x, below - cell - 0.17, truth[i], va="bottom", weight="bold", fontsize=8.5)
            _image(axes_at(figure, x, below - 0.12 - cell, cell, cell), found["images"][i])
            for row in range(len(arms)):
                mark, color = ("✓", RIGHT) if found["predictions"][row, i] == found["truth"][i] else ("✗", WRONG)
                write(figure, x, below + row * line, f"{mark} {answers[row][i]}", va="top", color=color, fontsize=8.5)
    return save(figure, path)


def _image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest" if image.shape[-1] < 96 else "antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(GRID)


# ---- routers
def routers_figure(panel: Path, path: Path) -> Path:
    """A row for each image; for each block the expert with the largest weight at every patch, and that weight.

    Args:
        panel: the file of `write_routers`. Raises UserError for another file.
        path: the PNG to write. All weights share one scale, which begins at 1, what a router weighs that has no preference.
    """
    from matplotlib.colors import ListedColormap

    found = read_panel(panel, "routers")
    omega, blocks, depth = found["omega"].astype(np.float32), found["blocks"].tolist(), int(found["depth"])
    best, most = omega.argmax(2), omega.max(2)
    names = [str(number + 1) for number in range(omega.shape[2])]
    colors = [color_of(name, names) for name in names]
    cell, pitch, gap, left, label = 1.15, 1.22, 0.18, 0.1, 1.0
    width = left + pitch + len(blocks) * (2 * pitch + gap) + 0.7
    top = 0.2 + 0.22 * legend_rows(names, width - label) + 0.5
    figure = new_figure(max(width, 5.0), top + pitch * len(found["images"]) + 0.05)
    legend(figure, names, colors, label)
    write(figure, left, 0.27, "Expert", va="center", weight="bold")
    discrete = {"cmap": ListedColormap(colors), "vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
    scale = {"cmap": "viridis", "vmin": 1.0, "vmax": max(1.01, float(most.max())), "interpolation": "nearest"}
    for row, image in enumerate(found["images"]):
        y = top + pitch * row
        _image(axes_at(figure, left, y, cell, cell), image)
        for number, block in enumerate(blocks):
            x = left + pitch + gap + number * (2 * pitch + gap)
            if row == 0:
                write(figure, x, y - 0.25, f"Block {block + 1} of {depth}", va="bottom", weight="bold")
                for place, text in enumerate(("strongest expert", "its weight ω")):
                    write(figure, x + pitch * place, y - 0.06, text, va="bottom", color=MUTED, fontsize=8.5)
            first, second = (axes_at(figure, x + pitch * place, y, cell, cell) for place in (0, 1))
            first.imshow(best[number, row], **discrete)
            drawn = second.imshow(most[number, row], **scale)
            for axes in (first, second):
                axes.axis("off")
    bar = figure.colorbar(drawn, cax=axes_at(figure, width - 0.6, top, 0.12, cell), format="%.2f")
    bar.set_ticks(np.linspace(scale["vmin"], scale["vmax"], 3))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    return save(figure, path)
