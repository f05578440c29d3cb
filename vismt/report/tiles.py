"""Rows of images with texts: a name above each image, and answers below the image, marked as right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vismt.report.plotting import INK, MUTED, RIGHT, WRONG, axes_at, new_figure, save_figure, short, show_image, write

_SIDE, _PITCH, _LINE, _LETTER = 1.25, 1.42, 0.19, 0.076  # inches: image, image with space, line, letter of 8.5 points
_NAME, _ANSWER = 18, 15  # letters of a name at the left, and of a text above or below an image


@dataclass(frozen=True)
class Tile:
    """An image and its texts.

    Args:
        pixels: Image, uint8 (3, h, w).
        head: Text above the image.
        answers: Texts below the image, each with whether it is right, None for a text that is neither right nor wrong.
    """

    pixels: np.ndarray
    head: str = ""
    answers: Sequence[tuple[str, bool | None]] = ()


@dataclass(frozen=True)
class TileRow:
    """Images side by side.

    Args:
        tiles: Images. None leaves the place empty.
        title: Text above the row.
        name: Text left of the images.
        lines: Texts left of the answers.
    """

    tiles: Sequence[Tile | None]
    title: str = ""
    name: str = ""
    lines: Sequence[str] = ()


def draw_tiles(rows: Sequence[TileRow], path: Path, note: str = "") -> Path:
    """Draw rows of images below each other, and a note below them. Return `path`."""
    longest = max(min(_NAME, len(text)) for row in rows for text in (row.name, *row.lines))
    left = 0.1 + (_LETTER * longest + 0.2 if longest else 0)
    tops, down = [], 0.05
    for row in rows:
        tiles = [tile for tile in row.tiles if tile is not None]
        tops.append(down + 0.08 + 0.3 * bool(row.title) + 0.2 * any(tile.head for tile in tiles))
        down = tops[-1] + _SIDE + 0.08 + _LINE * max((len(tile.answers) for tile in tiles), default=0)
    figure = new_figure(left + _PITCH * max(len(row.tiles) for row in rows), down + (0.35 if note else 0.1))
    for row, top in zip(rows, tops, strict=True):
        below = top + _SIDE + 0.08
        write(figure, 0.1, top - 0.28, short(row.title, 60), va="bottom", weight="bold", fontsize=10.5)
        write(figure, 0.1, top + _SIDE / 2, short(row.name, _NAME), va="center", color=MUTED, fontsize=8.5)
        for number, line in enumerate(row.lines):
            write(figure, 0.1, below + _LINE * number, short(line, _NAME), va="top", color=MUTED, fontsize=8.5)
        for column, tile in enumerate(row.tiles):
            if tile is None:
                continue
            x = left + _PITCH * column
            axes = axes_at(figure, x, top, _SIDE, _SIDE)
            show_image(axes, tile.pixels)
            write(figure, x, top - 0.05, short(tile.head, _ANSWER), va="bottom", weight="bold", fontsize=8.5)
            for number, (text, right) in enumerate(tile.answers):
                color = INK if right is None else RIGHT if right else WRONG
                mark = "" if right is None else "✓ " if right else "✗ "
                text = f"{mark}{short(text, _ANSWER + 2 * (not mark))}"
                write(figure, x, below + _LINE * number, text, va="top", color=color, fontsize=8.5)
    write(figure, 0.1, down + 0.2, note, fontsize=7, color=MUTED)
    return save_figure(figure, path)


def enlarged_change(images: np.ndarray, changed: np.ndarray) -> tuple[int, np.ndarray]:
    """Return a factor, and the difference of two batches of images uint8 times this factor, around middle grey."""
    change = changed.astype(int) - images.astype(int)
    gain = max(1, 127 // max(1, int(np.abs(change).max(initial=0))))
    return gain, np.clip(128 + gain * change, 0, 255).astype(np.uint8)
