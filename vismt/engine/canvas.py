"""The look of every figure: colours, fonts, and PNG files drawn without any global state of matplotlib.

Colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.errors import UserError
from vismt.lowrank.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#667080", "#e6e9ee"
PALETTE = ("#9aa4b2", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
RIGHT, WRONG = PALETTE[1], PALETTE[2]


def dress(axes: Axes, title: str) -> None:
    """Title to the left in bold, quiet ticks, no frame."""
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, **{"fontsize": 9, "color": INK, **style})


def short(text: str, most: int) -> str:
    """`text` for a label: at most `most` characters, and `$` kept from starting a formula."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of inches on its own Agg canvas; raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('report: figures need matplotlib; `pip install "vismt[report]"`.') from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG at once; returns `path`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "vismt"})
    atomic_write(path, buffer.getvalue())
    return path
