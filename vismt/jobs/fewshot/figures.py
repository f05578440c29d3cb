"""The picture of a pool: its mean mixture by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vismt.report.plotting import (
    INK,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    save,
    short,
)


def mixture_bars(
    shares: Mapping[str, Mapping[tuple[str, str], Sequence[float]]], labels: Sequence[str], path: Path
) -> Path:
    """Draw a panel for each model with a bar for each set: the mean weight of each expert, side by side to 100 %.

    Args:
        shares: by model and (set, note behind its name, such as n), the weights (P,) with sum 1.
        labels: of the P experts.
        path: the PNG to write.
    """
    sets = max(map(len, shares.values()))
    label = 0.078 * max(len(_row(*key)) for panel in shares.values() for key in panel) + 0.3
    width = label + 6.0
    rows = 0.34 * sets + 0.12
    numbers = [str(number) for number in range(len(labels))]
    colors = [color_of(number, numbers) for number in numbers]
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
