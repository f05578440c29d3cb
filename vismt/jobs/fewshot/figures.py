"""The picture of a pool: its mean mixture by set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vismt.report.plotting import (
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
    save_figure,
    short,
    show_image,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_CLASSES = 8
SHOWN_QUERIES = 2


def mixture_bars(
    shares: Mapping[str, Mapping[tuple[str, str], Sequence[float]]], labels: Sequence[str], path: Path
) -> Path:
    """Draw a panel for each model with a bar for each set: the mean weight of each expert, side by side to 100 %.

    shares: Weights (P,) with sum 1, by model and (set, note behind its name, such as n). labels: Labels of the P experts.
    """
    sets = max(map(len, shares.values()))
    label = 0.078 * max(len(_row(*key)) for panel in shares.values() for key in panel) + 0.3
    width = label + 4.0
    rows = 0.34 * sets + 0.12
    numbers = [str(number) for number in range(len(labels))]
    colors = [color_of(number, numbers) for number in numbers]
    parts = {color: [int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in colors}
    dark = {color: 0.3 * red + 0.59 * green + 0.11 * blue < 160 for color, (red, green, blue) in parts.items()}
    top = 0.33 + 0.22 * legend_rows(labels, width - label)
    figure = new_figure(width, top + len(shares) * (rows + 0.75) + 0.1)
    legend(figure, labels, colors, label)
    for place, (model, panel) in enumerate(shares.items()):
        offset = top + 0.35 + place * (rows + 0.75)
        axes = axes_at(figure, label, offset, 3.75, rows)
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
                        fontsize=8.5,
                        color="white" if dark[color] else INK,
                        fontweight="bold",
                    )
                left += 100 * weight
        axes.set(xlim=(0, 100), ylim=(len(panel) - 0.5, -0.5), yticks=range(len(panel)))
        dress(axes, short(model, 40))
        axes.spines["bottom"].set_visible(False)
        axes.set_yticklabels([_row(*key) for key in panel], fontsize=9, color=INK)
        axes.tick_params(length=0, labelbottom=place == len(shares) - 1)
    return save_figure(figure, path)


def _row(data: str, note: str) -> str:
    return f"{short(data, 24)}, {note}"


def episode_grid(panel: Mapping[str, np.ndarray], path: Path) -> Path:
    """Draw one episode with a column for each class: support, queries with predictions, attacked queries, the change.

    At most 8 classes and 2 queries of each class are drawn. panel: Arrays of a panels/*.npz: model (its name), support, query and
    optionally adversarial uint8 (., 3, h, w), their labels and predictions int (.,), and classes (k,) as text.
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
    for shot in range(max(map(len, queries), default=0)):
        rows.append(("query", "query", shot))
        if attacked:
            rows += [("adversarial", "attacked", shot), ("change", f"change × {gain:.0f}", shot)]
    cell, left, top = 1.25, 1.15, 0.45
    # Space above and below the images of a row: a new query begins with a gap, predictions stand under the image.
    above = [0.2 if kind == "query" else 0.0 for kind, _, _ in rows]
    below = [0.34 if kind in ("query", "adversarial") else 0.12 for kind, _, _ in rows]
    steps = [cell + under + over for over, under in zip(above, below, strict=True)]
    figure = new_figure(left + cell * 1.1 * len(classes) + 0.1, top + sum(steps) + 0.1)
    offset = top
    if "model" in panel:
        write(figure, 0.1, top - 0.12, short(str(panel["model"]), 18), va="bottom", color=MUTED, fontsize=8.5)
    for (kind, label, shot), step, over in zip(rows, steps, above, strict=True):
        offset += over
        for k, name in enumerate(classes):
            at = support[k][:1] if kind == "support" else queries[k][shot : shot + 1]
            box = (left + 1.1 * cell * k, offset, cell)
            if k == 0:
                write(figure, 0.1, offset + cell / 2, label, ha="left", va="center", color=MUTED, fontsize=9.5)
            if kind == "support":
                write(figure, box[0] + cell / 2, top - 0.12, short(name, 15), ha="center", va="bottom", weight="bold")
            if len(at):
                _cell(figure, box, panel, kind, int(at[0]), gain)
        offset += step - over
    return save_figure(figure, path)


def _cell(figure: Figure, box: tuple[float, float, float], panel: Mapping, kind: str, at: int, gain: float) -> None:
    if kind == "change":
        change = panel["adversarial"][at].astype(float) - panel["query"][at].astype(float)
        image = np.clip(128 + gain * change, 0, 255).astype(np.uint8)
    else:
        image = panel[kind][at]
    left, offset, side = box
    axes = axes_at(figure, left, offset, side, side)
    show_image(axes, image)
    guesses = {"query": "predictions", "adversarial": "adversarial_predictions"}.get(kind)
    color, width = GRID, 1.0
    if guesses is not None:
        counted = panel[guesses][at] == panel["query_labels"][at]
        if kind == "adversarial" and "adversarial_right" in panel:
            counted = panel["adversarial_right"][at]
        color, width = RIGHT if counted else WRONG, 2.2
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=width)
    if guesses is not None:
        guess = short(str(panel["classes"][int(panel[guesses][at])]), 12)
        text = f"{'✓' if color == RIGHT else '✗'} {guess}"
        write(figure, left + side / 2, offset + side + 0.07, text, ha="center", va="top", color=color, weight="bold")
