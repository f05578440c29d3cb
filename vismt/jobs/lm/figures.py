"""The figure of forgetting: the score of the trained task against the perplexity of texts that were not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vismt.report.plotting import (
    GRID,
    INK,
    MUTED,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    save,
    short,
)


@dataclass(frozen=True)
class Point:
    """One training: the rate, the trained task's score and the perplexity of other texts."""

    lr: float
    score: float
    perplexity: float


def forgetting_figure(
    families: Mapping[str, Sequence[Point]], frozen: Point | None, score: str, perplexity: str, path: Path
) -> Path:
    """Draw a dot for each training and, for each family, a line through the means over seeds from rate to rate.

    Args:
        families: trainings of arms that differ in the rate alone.
        frozen: the model before training, if it was evaluated; drawn as dashed lines where they fall within the axes.
        score: name of the first axis.
        perplexity: name of the second axis.
        path: the PNG to write.

    Returns:
        `path`.
    """
    names = list(families)
    width = 7.4
    left = 0.75
    offset = 0.12 + 0.22 * legend_rows(names, width - left)
    figure = new_figure(width, offset + 4.1)
    legend(figure, [short(name, 40) for name in names], [color_of(name, names) for name in names], left)
    axes = axes_at(figure, left, offset + 0.15, width - left - 0.25, 3.4)
    dress(axes, "")
    for name, points in families.items():
        color = color_of(name, names)
        xs = [point.score for point in points]
        ys = [point.perplexity for point in points]
        axes.scatter(xs, ys, s=18, color=color, alpha=0.55, linewidth=0, zorder=3)
        means = []
        for lr in sorted({point.lr for point in points}):
            at_rate = [point for point in points if point.lr == lr]
            score_mean = math.fsum(point.score for point in at_rate) / len(at_rate)
            perplexity_mean = math.fsum(point.perplexity for point in at_rate) / len(at_rate)
            means.append((score_mean, perplexity_mean))
            axes.annotate(
                f"{lr:g}",
                means[-1],
                xytext=(5, 4),
                textcoords="offset points",
                color=INK,
                fontsize=7.5,
                zorder=4,
                bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            )
        axes.plot(*zip(*means, strict=True), color=color, linewidth=1.6, marker="s", markersize=4, zorder=2)
    axes.margins(0.09)
    if frozen is not None:
        spans = (axes.get_xlim(), axes.get_ylim())
        for line, value, (low, high) in zip(
            (axes.axvline, axes.axhline), (frozen.score, frozen.perplexity), spans, strict=True
        ):
            if low <= value <= high:
                line(value, color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_xlabel(score, color=MUTED, fontsize=9)
    axes.set_ylabel(perplexity, color=MUTED, fontsize=9)
    return save(figure, path)
