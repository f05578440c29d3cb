"""What only the report of a multi-task run shows: examples with the answers of every arm, and maps of routers.

The examples are written to a file of the run folder by the evaluation, and drawn from it by the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.jobs.multitask.data import TaskData
from vismt.report.arm_figures import LETTER
from vismt.report.confusion import write_confusion
from vismt.report.panels import read_panel, spread, to_bytes, write_panel
from vismt.report.plotting import MUTED, RIGHT, WRONG, axes_at, new_figure, save_figure, short, show_image, write
from vismt.report.results import RECORDS
from vismt.report.routers import router_pictures
from vismt.report.tables import Picture, Section
from vismt.storage.lines import read_lines

EXAMPLES = "examples.npz"
PER_TASK, _SHOWN = 6, 8  # images that are written, and the most that are drawn


def examples(
    folder: Path, data: TaskData, split: str, trainings: Sequence[Training], path: Path, count: int = PER_TASK
) -> Path:
    """Write `count` evaluated images of each task, evenly over its images, with the answers of trainings of several arms.

    The answers are read from the records; nothing is evaluated. Raises UserError for an image without a record of an arm.
    """
    names = data.label_names
    images: list[Tensor] = []
    truth: list[str] = []
    tasks: list[str] = []
    answers: dict[str, list[str]] = {training.arm: [] for training in trainings}
    for number, task in enumerate(data.union.tasks):
        part = data.part(number, split)
        index = spread(len(part), count)
        images.append(part[index])
        truth += [names[label] for label in part.labels[index].tolist()]
        tasks += [task] * len(index)
        ids = [part.ids[i] for i in index.tolist()]
        for training in trainings:
            answers[training.arm] += _answers(folder, training, f"{split}-{task}", ids, names)
    return write_examples(path, to_bytes(torch.cat(images)), truth, tasks, answers)


def write_confusions(folder: Path, data: TaskData, split: str, trainings: Mapping[str, Sequence[Training]]) -> None:
    """Write the answers to the images of each task, class by class, for every arm over its trainings, from the records."""
    for number, task in enumerate(data.union.tasks):
        names, offset = list(data.classes[number]), data.union.offset(number)
        span = range(offset, offset + len(names))
        tables = {}
        for arm, several in trainings.items():
            table = np.zeros((len(span), len(span) + 1), dtype=np.int64)
            for training in several:
                for row in read_lines(training.folder / RECORDS / f"{split}-{task}.jsonl"):
                    if row.get("label") in span and "clean" in row:
                        answer = span.index(row["clean"]) if row["clean"] in span else len(span)
                        table[span.index(row["label"]), answer] += 1
            if table.any():
                tables[arm] = table
        others = any(table[:, -1].any() for table in tables.values())
        if tables:
            kept = {arm: table if others else table[:, :-1] for arm, table in tables.items()}
            write_confusion(folder, task, names, [*names, *(["another task"] if others else [])], kept)


def write_examples(
    path: Path, images: np.ndarray, truth: Sequence[str], tasks: Sequence[str], predictions: Mapping[str, Sequence[str]]
) -> Path:
    """Write images uint8 (n, 3, h, w), the names of their classes, and by arm its answers; return `path`."""
    arrays = {
        "images": images,
        "truth": np.array(list(truth), dtype=str),
        "tasks": np.array(list(tasks), dtype=str),
        "arms": np.array(list(predictions), dtype=str),
    }
    answers = np.array([list(names) for names in predictions.values()], dtype=str)
    return write_panel(path, "examples", {**arrays, "predictions": answers})


def _answers(folder: Path, training: Training, stem: str, ids: Sequence[str], names: Sequence[str]) -> list[str]:
    path = training.folder / "records" / f"{stem}.jsonl"
    answers = {row["id"]: row.get("clean") for row in read_lines(path) if "id" in row}
    classes = []
    for name in ids:
        answer = answers.get(name)
        if not isinstance(answer, int) or not 0 <= answer < len(names):
            raise UserError(f"examples: '{path}' lacks image '{name}'; `vismt evaluate {folder}` completes it.")
        classes.append(names[answer])
    return classes


def examples_figure(panel: Path, path: Path) -> Path:
    """Draw a band for each task: its images, the true class above, and below each arm's answer, ✓ right or ✗ wrong.

    An answer that is a class of another task is shown with the name of that task. panel: the file of `write_examples`; at most
    8 images of a task are drawn.
    """
    arrays = read_panel(panel, "examples")
    arms = arrays["arms"].tolist()
    tasks = arrays["tasks"].tolist()
    bands = {task: np.flatnonzero(arrays["tasks"] == task)[:_SHOWN].tolist() for task in dict.fromkeys(tasks)}
    truth, *answers = (
        [short(name.removeprefix(f"{task}/"), 15) for task, name in zip(tasks, line)]
        for line in (arrays["truth"].tolist(), *arrays["predictions"].tolist())
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
            show_image(axes_at(figure, x, below - 0.12 - cell, cell, cell), arrays["images"][i])
            for row in range(len(arms)):
                mark, color = ("✓", RIGHT) if arrays["predictions"][row, i] == arrays["truth"][i] else ("✗", WRONG)
                write(figure, x, below + row * line, f"{mark} {answers[row][i]}", va="top", color=color, fontsize=8.5)
    return save_figure(figure, path)


CAPTION = (
    "Test images at even distances in each task, not chosen by result; answers of the first seed. ✓ right, ✗ wrong; an answer "
    "from another task stands with the name of that task."
)


def sections(folder: Path) -> list[Section]:
    """Return the section of images, as far as the run folder has the files."""
    pictures = []
    if (folder / EXAMPLES).exists():
        path = examples_figure(folder / EXAMPLES, folder / "figures" / "examples.svg")
        pictures.append(Picture(path, "Examples", CAPTION))
    return [Section("Images", pictures=[*pictures, *router_pictures(folder)], folded=True)]
