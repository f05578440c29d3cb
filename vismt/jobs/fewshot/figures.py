"""The picture of a pool: its mean mixture by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vismt.report.plotting import INK, axes_at, color_of, dress, legend, legend_rows, new_figure, save_figure, short
from vismt.report.tiles import Tile, TileRow, draw_tiles, enlarged_change

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
    names, truth = [str(name) for name in panel["classes"]], panel["query_labels"]
    classes = range(min(SHOWN_CLASSES, len(names)))

    def tiles(
        labels: np.ndarray, shot: int, images: np.ndarray, guesses: str = "", counted: str = ""
    ) -> list[Tile | None]:
        """Return image number `shot` of each class. guesses, counted: Arrays of the answers, and of which are right."""
        found: list[Tile | None] = []
        for label in classes:
            at = np.flatnonzero(labels == label)[shot : shot + 1]
            answers = []
            for place in at if guesses else ():
                right = panel[counted][place] if counted in panel else panel[guesses][place] == label
                answers.append((names[int(panel[guesses][place])], bool(right)))
            found.append(Tile(images[at[0]], answers=answers) if len(at) else None)
        return found

    support = tiles(panel["support_labels"], 0, panel["support"])
    heads = [tile and replace(tile, head=name) for tile, name in zip(support, names)]
    rows = [TileRow(heads, str(panel.get("model", "")), "support")]
    for shot in range(min(SHOWN_QUERIES, max(int((truth == label).sum()) for label in classes))):
        rows.append(TileRow(tiles(truth, shot, panel["query"], "predictions"), name="query"))
        if "adversarial" in panel:
            gain, change = enlarged_change(panel["query"], panel["adversarial"])
            attacked = tiles(truth, shot, panel["adversarial"], "adversarial_predictions", "adversarial_right")
            rows.append(TileRow(attacked, name="attacked"))
            rows.append(TileRow(tiles(truth, shot, change), name=f"change × {gain}"))
    return draw_tiles(rows, path)
