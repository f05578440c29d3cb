"""The look of every figure: colours, fonts, and files drawn without any global state of matplotlib.

The colours of Okabe and Ito are used, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vismt.base.errors import UserError
from vismt.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#667080", "#e6e9ee"
PALETTE = ("#9aa4b2", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#f0e442", "#8c510a", "#5e4fa2")
RIGHT, WRONG = PALETTE[1], PALETTE[2]
DASHES = (0, (3, 3))
SMALL = 8.5  # points of the smallest letters of a figure, 11.3 px on a page
NARROW = 3.4  # inches of a figure that fits the screen of a telephone
FIGURE_DPI = 150
FIGURES = ("svg", "pdf", "png")
# Fonts inside the file: TrueType in PDF, which publishers ask for, and outlines in SVG. Two runs give the same bytes.
EMBEDDED: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "vismt"}
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": "vismt"},
    "svg": {"Date": None, "Creator": "vismt"},
    "pdf": {"CreationDate": None, "Creator": "vismt"},
}
_formats: ContextVar[tuple[str, ...]] = ContextVar("formats", default=())


def dress(axes: Axes, title: str, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Give axes a bold title at the left, grey ticks, no frame, and lines at the ticks of `grid`."""
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=SMALL, length=0)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text at inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, **{"fontsize": 9, "color": INK, **style})


def write_note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], coords: Any = "data", **style: Any
) -> None:
    """Write text at points from a place of axes."""
    settings = {"textcoords": "offset points", "color": INK, **style}
    axes.annotate(text, at, shift, coords, **settings)


def short(text: str, most: int) -> str:
    """Return `text` for a label: at most `most` characters, with `$` escaped so that it does not start a formula."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def color_of(model: str, models: Sequence[str]) -> str:
    """Return grey for "frozen", otherwise the colour of the palette by order.

    Beyond its end the palette is repeated, but paler.
    """
    if model == "frozen":
        return PALETTE[0]
    turn, place = divmod([name for name in models if name != "frozen"].index(model), len(PALETTE) - 1)
    color = PALETTE[1 + place]
    if not turn:
        return color
    parts = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - part) // (turn + 1):02x}" for part in parts)


def legend_rows(names: Sequence[str], width: float, chance: bool = False) -> int:
    """Return the number of rows of 0.22 inches that the legend needs within `width` inches."""
    return math.ceil((len(names) + chance) / _legend_columns(names, width, chance))


def legend(figure: Figure, names: Sequence[str], colors: Sequence[str], left: float, *, chance: bool = False) -> None:
    """Draw names by colour, from `left` inches to the right edge, under the upper edge.

    chance: Whether to draw its dashed line too.
    """
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    handles: list[Artist] = [Patch(color=color, label=name) for name, color in zip(names, colors, strict=True)]
    if chance:
        handles.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=DASHES, label="chance"))
    columns = _legend_columns(names, width - left, chance)
    rows = math.ceil(len(handles) / columns)
    # matplotlib fills column by column. Read row by row, the names stay in their order.
    handles = [handles[at] for column in range(columns) for at in range(column, len(handles), columns)]
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(left / width, 1 - (0.16 + 0.11 * rows) / height),
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.3,
        borderaxespad=0,
        columnspacing=1.6,
        labelspacing=0.35,
    )


def _legend_columns(names: Sequence[str], width: float, chance: bool) -> int:
    longest = max(map(len, names), default=0)
    return max(1, min(len(names) + chance, int(width / (0.075 * max(longest, 6) + 0.5))))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the exponential mean over a twentieth of the run. Its weights sum to one from the first value on."""
    keep = 1 - 2 / (max(1, len(values) // 20) + 1)
    total = weight = 0.0
    smooth = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smooth[i] = total / weight
    return smooth


def need_matplotlib() -> None:
    """Raise UserError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError('report: figures need matplotlib; `pip install "vismt[jobs]"`.')


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of inches on an Agg canvas. Raise UserError without matplotlib."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=FIGURE_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at inches from the upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def one_panel(names: Sequence[str], colors: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Return a figure that a telephone has room for, with names by colour above its axes."""
    left = 0.6
    offset = 0.12 + 0.22 * legend_rows(names, NARROW - left)
    figure = new_figure(NARROW, offset + 2.35)
    legend(figure, [short(name, 36) for name in names], colors, left)
    axes = axes_at(figure, left, offset + 0.3, NARROW - left - 0.2, 1.55)
    dress(axes, title, grid="y")
    return figure, axes


def show_image(axes: Axes, image: np.ndarray, small: int = 96) -> None:
    """Show an image uint8 (3, h, w) in a thin frame. Images less wide than `small` keep their pixels."""
    axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest" if image.shape[-1] < small else "antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(GRID)


@contextmanager
def figure_formats(formats: Sequence[str]) -> Iterator[None]:
    """Make `save` also write a figure in the formats of FIGURES that are among `formats`, while the body runs."""
    token = _formats.set(tuple(name for name in FIGURES if name in formats))
    try:
        yield
    finally:
        _formats.reset(token)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the file atomically, in the format of its ending, and beside it in the formats of `figure_formats`. Return `path`."""
    from matplotlib import rc_context

    for name in dict.fromkeys((path.suffix[1:], *_formats.get())):
        buffer = io.BytesIO()
        with rc_context(EMBEDDED):
            figure.savefig(buffer, format=name, metadata=METADATA[name])
        atomic_write(path.with_suffix(f".{name}"), buffer.getvalue())
    return path
