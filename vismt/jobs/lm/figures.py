"""The section and figure of forgetting: the score of the trained task against the perplexity of texts not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from vismt.engine.study import FROZEN, Study
from vismt.jobs.lm.config import REFERENCES, LmConfig, trained_task
from vismt.report.plotting import (
    MUTED,
    axes_at,
    color_of,
    dress,
    legend,
    legend_rows,
    new_figure,
    save_figure,
    short,
    write_note,
)
from vismt.report.results import Result
from vismt.report.tables import Picture, Section, scale_text
from vismt.uncertainty.intervals import SHARE

PERPLEXITY = "perplexity"


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

    families: Trainings of arms that differ only in the rate. frozen: Model before training, drawn as dashed lines if they fall
    within the axes. score, perplexity: Names of the axes.
    """
    names = list(families)
    width, left = 7.4, 0.75
    offset = 0.12 + 0.22 * legend_rows(names, width - left)
    figure = new_figure(width, offset + 4.1)
    legend(figure, [short(name, 40) for name in names], [color_of(name, names) for name in names], left)
    axes = axes_at(figure, left, offset + 0.15, width - left - 0.25, 3.4)
    dress(axes, "", grid="both")
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
            box = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
            write_note(axes, f"{lr:g}", means[-1], (5, 4), fontsize=8.5, zorder=4, bbox=box)
        axes.plot(*zip(*means, strict=True), color=color, linewidth=1.6, marker="s", markersize=4, zorder=2)
    axes.margins(0.09)
    if frozen is not None:
        spans = (axes.get_xlim(), axes.get_ylim())
        for line, value, (low, high) in zip(
            (axes.axvline, axes.axhline), (frozen.score, frozen.perplexity), spans, strict=True
        ):
            if low <= value <= high:
                line(value, color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
    axes.set_xlabel(score, color=MUTED, fontsize=9)
    axes.set_ylabel(perplexity, color=MUTED, fontsize=9)
    return save_figure(figure, path)


_CAPTION = (
    "A dot for each training; squares and a line for the means over seeds of arms that differ only in the rate, which is "
    "written beside them. Compare at equal values of the trained task: a method forgets less where its line lies lower. "
    "Dashed: the model before training, where it lies within the axes."
)


def sections(folder: Path, config: LmConfig, study: Study[LmConfig], results: Sequence[Result]) -> list[Section]:
    """Return a picture for each set that has a perplexity and was not trained on."""
    trained = trained_task(config).name
    clean = [row for row in results if row.condition == "clean"]
    score = next((row for row in clean if row.task == trained), None)
    others = dict.fromkeys((row.task, row.data) for row in clean if row.metric == PERPLEXITY and row.task != trained)
    if score is None or not study.arms:
        return []
    factor = 100 if score.scale == SHARE else 1
    pictures = []
    for number, (task, data) in enumerate(others):
        trainings = _by_training(clean, (trained, score.data, score.metric), len(study.seeds))
        texts = _by_training(clean, (task, data, PERPLEXITY), len(study.seeds))
        points = {}
        for (arm, seed), row in trainings.items():
            if (arm, seed) in texts:
                lr = 0.0 if arm in REFERENCES else study.trainings(arm)[0].lr  # the chosen rate
                points[arm, seed] = Point(lr, factor * row.value, texts[arm, seed].value)
        path = folder / "figures" / f"forgetting-{number}.svg"
        across = f"{trained} on {score.data}: {scale_text(score.metric, score.scale, score.better)}"
        families = _families(config, points)
        forgetting_figure(families, points.get((FROZEN, None)), across, f"{data}: {PERPLEXITY} ↓", path)
        pictures.append(Picture(path, f"Forgetting of {data}", _CAPTION))
    return [Section("Forgetting", pictures=pictures)]


def _by_training(
    rows: Sequence[Result], score: tuple[str, str, str], seeds: int
) -> dict[tuple[str, int | None], Result]:
    """Return the rows of a score by arm and seed. References and a single seed have the row of the mean."""
    return {
        (row.arm, row.seed): row
        for row in rows
        if (row.task, row.data, row.metric) == score and (row.seed is None) == (row.arm in REFERENCES or seeds == 1)
    }


def _families(config: LmConfig, points: dict[tuple[str, int | None], Point]) -> dict[str, list[Point]]:
    """Return the points of arms that differ only in the rate, by the common start of the arms' names."""
    groups: dict[str, list[str]] = {}
    for arm, changes in config.arms.items():
        others = repr(sorted((key, value) for key, value in changes.items() if key != "train.lr"))
        groups.setdefault(others, []).append(arm)
    names: dict[str, str] = {}
    for group in groups.values():
        common = "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*group)))
        names |= dict.fromkeys(group, common.rstrip("-_ ") or group[0])
    families: dict[str, list[Point]] = {}
    for (arm, _), point in points.items():
        if arm not in REFERENCES:
            families.setdefault(names.get(arm, arm), []).append(point)
    return families
