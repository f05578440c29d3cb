"""The prediction panel of a dense run: images, their truth, and every arm's prediction with the image's own score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vismt.report.panels import read_panel
from vismt.report.plotting import MUTED, axes_at, new_figure, save, short, show_image, write
from vismt.report.study_figures import LETTER
from vismt.report.tables import number_text, scale_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, WIDEST, GAP = 1.35, 11.0, 0.07  # inches: of a square picture, of a figure, between pictures
HEAD, LINE, BELOW, APART = (
    0.22,
    0.22,
    0.19,
    0.3,
)  # of the names over a block, a task over its row, scores, between blocks


def predictions_figure(panel: Path, path: Path) -> Path:
    """A block for each image: the input, and a row for each task of its truth and each arm's prediction, its score below.

    Args:
        panel: the file of `write_panels`. Raises UserError for another file.
        path: the PNG to write. Blocks stand side by side where they are narrow. An arm that does not train a task leaves its
            place empty.
    """
    found = read_panel(panel, "dense")
    count, _, rows, columns = found["images"].shape
    pictures = 2 + len(found["arms"])
    width = min(SIDE * math.sqrt(columns / rows), (WIDEST - 0.2) / pictures - GAP)
    size = (width, width * rows / columns)
    wide, high = (
        pictures * (width + GAP) - GAP + APART,
        HEAD + len(found["tasks"]) * (LINE + size[1] + BELOW) + APART / 2,
    )
    across = max(1, min(count, int((WIDEST - 0.2 + APART) / wide)))
    figure = new_figure(0.2 + across * wide - APART, 0.05 + high * math.ceil(count / across))
    for number in range(count):
        down, right = divmod(number, across)
        _block(figure, found, number, 0.1 + right * wide, 0.05 + down * high, size)
    return save(figure, path)


def _block(
    figure: Figure, found: Mapping[str, np.ndarray], number: int, left: float, top: float, size: tuple[float, float]
) -> None:
    """One image at inches from the upper left corner. size: (width, height) of a picture."""
    (width, height), arms = size, found["arms"].tolist()
    pitch, most = width + GAP, max(4, int(width / LETTER))
    for place, name in enumerate(["Input", "Truth", *arms]):
        write(
            figure, left + place * pitch, top + HEAD - 0.03, short(name, int(most * 0.85)), va="bottom", weight="bold"
        )
    for row, metric in enumerate(found["metrics"].tolist()):
        y = top + HEAD + LINE + row * (LINE + height + BELOW)
        told = short(scale_text(metric, bool(found["lower_is_better"][row])), int((1 + len(arms)) * pitch / LETTER))
        write(figure, left + pitch, y - 0.05, told, va="bottom", color=MUTED, fontsize=8.5)
        if row == 0:
            show_image(axes_at(figure, left, y, width, height), found["images"][number])
            name = found["ids"][number].rpartition("/")[2]
            write(figure, left, y + height + 0.04, short(name, most), va="top", color=MUTED, fontsize=8)
        show_image(axes_at(figure, left + pitch, y, width, height), found["truth"][row, number])
        for place in (at for at in range(len(arms)) if found["trained"][at, row]):
            x, score = left + (2 + place) * pitch, float(found["scores"][place, row, number])
            show_image(axes_at(figure, x, y, width, height), found["predictions"][place, row, number])
            text = "–" if math.isnan(score) else number_text(score, metric)
            write(figure, x, y + height + 0.04, text, va="top", fontsize=8.5)
