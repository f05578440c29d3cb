"""The picture of an arm's routers: the strongest expert at every patch of some images, and its weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vismt.report.panels import read_panel
from vismt.report.plotting import (
    MUTED,
    axes_at,
    color_of,
    legend,
    legend_rows,
    new_figure,
    save_figure,
    show_image,
    write,
)
from vismt.report.tables import Picture

ROUTERS = "routers"  # folder of the files
_CAPTION = (
    "Weights of the router at fade 0, on the tokens of the trained model at its trained fade. They average 1 over the experts. "
    "An expert's number has a meaning only within its block."
)


def routers_figure(panel: Path, path: Path) -> Path:
    """Draw a row for each image: for each block the expert with the largest weight at every patch, and this weight.

    All weights share one scale, which begins at 1, the weight of every expert if a router has no preference. panel: File with
    the arrays of `vismt.multitask.emtal.router_maps`, and images.
    """
    from matplotlib.colors import ListedColormap

    arrays = read_panel(panel)
    images, omega = arrays["images"], arrays["omega"].astype(np.float32)
    blocks, depth = arrays["blocks"].tolist(), int(arrays["depth"])
    best, most = omega.argmax(2), omega.max(2)
    names = [str(number + 1) for number in range(omega.shape[2])]
    colors = [color_of(name, names) for name in names]
    cell, pitch, gap, left, label = 1.15, 1.22, 0.18, 0.1, 1.0
    rows, columns = images.shape[-2:]
    across = cell * min(1.0, columns / rows)
    down = cell * min(1.0, rows / columns)
    width = left + pitch + len(blocks) * (2 * pitch + gap) + 0.7
    top = 0.2 + 0.22 * legend_rows(names, width - label) + 0.5
    figure = new_figure(max(width, 5.0), top + (down + 0.07) * len(images) + 0.05)
    legend(figure, names, colors, label)
    write(figure, left, 0.27, "Expert", va="center", weight="bold")
    colormap = ListedColormap(colors)
    highest = max(1.01, float(most.max()))
    for row, image in enumerate(images):
        y = top + (down + 0.07) * row
        show_image(axes_at(figure, left, y, across, down), image)
        for number, block in enumerate(blocks):
            x = left + pitch + gap + number * (2 * pitch + gap)
            if row == 0:
                write(figure, x, y - 0.25, f"Block {block + 1} of {depth}", va="bottom", weight="bold")
                for place, text in enumerate(("strongest expert", "its weight ω")):
                    write(figure, x + pitch * place, y - 0.06, text, va="bottom", color=MUTED, fontsize=8.5)
            first, second = (axes_at(figure, x + pitch * place, y, across, down) for place in (0, 1))
            first.imshow(best[number, row], cmap=colormap, vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
            drawn = second.imshow(most[number, row], cmap="viridis", vmin=1.0, vmax=highest, interpolation="nearest")
            for axes in (first, second):
                axes.axis("off")
    bar = figure.colorbar(drawn, cax=axes_at(figure, width - 0.6, top, 0.12, down), format="%.2f")
    bar.set_ticks(np.linspace(1.0, highest, 3).tolist())
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    return save_figure(figure, path)


def router_pictures(folder: Path) -> list[Picture]:
    """Draw the picture of every file in the run folder."""
    pictures = []
    for panel in sorted((folder / ROUTERS).glob("*.npz")):
        path = routers_figure(panel, folder / "figures" / f"routers-{panel.stem}.svg")
        pictures.append(Picture(path, f"Routers of {panel.stem}", _CAPTION))
    return pictures
