"""The pictures of a multi-task run: accuracy by arm and seed, training of the arms, and examples with answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vismt.errors import UserError
from vismt.report import study_figures
from vismt.report.panels import read_panel
from vismt.report.plotting import MUTED, RIGHT, WRONG, axes_at, new_figure, save, short, show_image, write
from vismt.report.study_figures import LETTER, SeedsPanel

MEAN = "mean over tasks"
CURVES = {
    "ce": "Training cross-entropy",
    "loss": "Training loss",
    "accuracy": "Training accuracy (%)",
    "fade": "Router fade",
}
SHOWN = 8


def seeds_figure(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The figure of study_figures with a panel for each task and for their mean, in per cent.

    Args:
        lines: of seeds.jsonl; of these the clean ones are drawn.
        path: the PNG to write. With one task there is no panel of the mean.
    """
    clean = [line for line in lines if line.get("condition") == "clean"]
    if not clean:
        raise UserError(f"seeds: none of {len(lines)} lines is of the clean images; evaluate the run again.")
    tables, counts = _by_task(clean)
    panels = []
    for task, table in tables.items():
        told = f"n = {' to '.join(f'{n:,}' for n in counts[task])} images" if task in counts else f"{len(counts)} tasks"
        panels.append(SeedsPanel(task, f"accuracy (%), {told}", table, ".1f"))
    return study_figures.seeds_figure(panels, list(dict.fromkeys(line["arm"] for line in clean)), path)


def _by_task(
    clean: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[tuple[Any, Any], float]], dict[str, list[int]]]:
    """Per cent by task, arm and seed, the mean over tasks last where all tasks have it; and the numbers of images."""
    tables: dict[str, dict[tuple[Any, Any], float]] = {}
    found: dict[str, set[int]] = {}
    try:
        for line in clean:
            tables.setdefault(line["data"], {})[line["arm"], line["seed"]] = 100 * line["value"]
            found.setdefault(line["data"], set()).add(line["n"])
    except (KeyError, TypeError) as error:
        raise UserError(f"seeds: a line is not what a run writes ({error!r}); evaluate the run again.") from error
    if len(tables) > 1:
        shared = [key for key in next(iter(tables.values())) if all(key in table for table in tables.values())]
        mean = {key: math.fsum(table[key] for table in tables.values()) / len(tables) for key in shared}
        tables |= {MEAN: mean} if mean else {}
    return tables, {task: sorted({min(numbers), max(numbers)}) for task, numbers in found.items()}


def curves_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """The figure of study_figures with cross-entropy (the loss where it was not logged), accuracy and fade."""
    known = any(row.get("ce") is not None for rows in logs.values() for row in rows)
    return study_figures.curves_figure(
        logs, {name: told for name, told in CURVES.items() if name != "loss" or not known}, path
    )


def examples_figure(panel: Path, path: Path) -> Path:
    """A band for each task: its images, the true class above, and below a line for each arm's answer, ✓ right or ✗ wrong.

    Args:
        panel: the file of `write_examples`; at most 8 images of a task are drawn. Raises UserError for another file.
        path: the PNG to write. An answer of another task is named with it.
    """
    found = read_panel(panel, "examples")
    arms, tasks = found["arms"].tolist(), found["tasks"].tolist()
    bands = {task: np.flatnonzero(found["tasks"] == task)[:SHOWN].tolist() for task in dict.fromkeys(tasks)}
    truth, *answers = (
        [short(name.removeprefix(f"{task}/"), 15) for task, name in zip(tasks, line)]
        for line in (found["truth"].tolist(), *found["predictions"].tolist())
    )
    cell, pitch, line, band = 1.2, 1.42, 0.19, 0.32
    left = max(0.8, LETTER * min(18, max(map(len, arms))) + 0.3)
    height = band + 0.25 + cell + 0.12 + line * len(arms) + 0.15
    figure = new_figure(left + pitch * max(map(len, bands.values())) + 0.1, height * len(bands) + 0.1)
    for number, (task, chosen) in enumerate(bands.items()):
        top = number * height
        write(figure, 0.1, top + band, short(task, 60), fontsize=10.5, weight="bold", va="bottom")
        below = top + band + 0.25 + cell + 0.12
        for row, arm in enumerate(arms):
            write(figure, 0.1, below + row * line, short(arm, 18), va="top", color=MUTED, fontsize=8.5)
        for column, i in enumerate(chosen):
            x = left + pitch * column
            write(figure, x, below - cell - 0.17, truth[i], va="bottom", weight="bold", fontsize=8.5)
            show_image(axes_at(figure, x, below - 0.12 - cell, cell, cell), found["images"][i])
            for row in range(len(arms)):
                mark, color = ("✓", RIGHT) if found["predictions"][row, i] == found["truth"][i] else ("✗", WRONG)
                write(figure, x, below + row * line, f"{mark} {answers[row][i]}", va="top", color=color, fontsize=8.5)
    return save(figure, path)
