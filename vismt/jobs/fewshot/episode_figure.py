"""The picture of one few-shot episode: support, queries with predictions, and attacked queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vismt.report.plotting import GRID, MUTED, RIGHT, WRONG, axes_at, new_figure, save, short, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_CLASSES = 8
SHOWN_QUERIES = 2


def episode_grid(panel: Mapping[str, np.ndarray], path: Path) -> Path:
    """Draw one episode with a column for each class: support, queries with predictions, attacked queries, the change.

    Args:
        panel: the arrays of a panels/*.npz: model (its name), support, query and optionally adversarial uint8 (., 3, h, w),
            their labels and predictions int (.,), classes (k,) of text. At most 8 classes and 2 queries of each are drawn.
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
    for shot in range(max(map(len, queries), default=0)):
        rows.append(("query", "query", shot))
        if attacked:
            rows += [("adversarial", "attacked", shot), ("change", f"change × {gain:.0f}", shot)]
    cell = 1.25
    left = 1.15
    top = 0.45
    # Space above and below the images of a row: a new query begins with a gap, predictions stand under the image.
    above = [0.2 if kind == "query" else 0.0 for kind, _, _ in rows]
    below = [0.34 if kind in ("query", "adversarial") else 0.12 for kind, _, _ in rows]
    steps = [cell + under + over for over, under in zip(above, below, strict=True)]
    figure = new_figure(left + cell * 1.1 * len(classes) + 0.1, top + sum(steps) + 0.1)
    offset = top
    if "model" in panel:
        write(figure, 0.1, top - 0.12, short(str(panel["model"]), 18), va="bottom", color=MUTED, fontsize=8)
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
    return save(figure, path)


def _cell(figure: Figure, box: tuple[float, float, float], panel: Mapping, kind: str, at: int, gain: float) -> None:
    """Draw one image, and under a query or an attacked query the predicted class."""
    if kind == "change":
        change = panel["adversarial"][at].astype(float) - panel["query"][at].astype(float)
        image = np.clip(128 + gain * change, 0, 255).astype(np.uint8)
    else:
        image = panel[kind][at]
    left, offset, side = box
    axes = axes_at(figure, left, offset, side, side)
    axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest" if image.shape[-1] < 96 else "antialiased")
    axes.set(xticks=[], yticks=[])
    guesses = {"query": "predictions", "adversarial": "adversarial_predictions"}.get(kind)
    color = GRID
    width = 1.0
    if guesses is not None:
        counted = panel[guesses][at] == panel["query_labels"][at]
        if kind == "adversarial" and "adversarial_right" in panel:
            counted = panel["adversarial_right"][at]
        color = RIGHT if counted else WRONG
        width = 2.2
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=width)
    if guesses is not None:
        guess = short(str(panel["classes"][int(panel[guesses][at])]), 12)
        text = f"{'✓' if color == RIGHT else '✗'} {guess}"
        write(figure, left + side / 2, offset + side + 0.07, text, ha="center", va="top", color=color, weight="bold")
