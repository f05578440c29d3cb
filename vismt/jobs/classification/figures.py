"""What only the report of a multi-task run shows: examples with the answers of every arm, and maps of routers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vismt.jobs.classification.panels import EXAMPLES
from vismt.report.arm_figures import LETTER
from vismt.report.panels import read_panel
from vismt.report.plotting import MUTED, RIGHT, WRONG, axes_at, new_figure, save, short, show_image, write
from vismt.report.routers import router_pictures
from vismt.report.tables import Picture, Section

SHOWN = 8


def examples_figure(panel: Path, path: Path) -> Path:
    """Draw a band for each task: its images, the true class above, and below each arm's answer, ✓ right or ✗ wrong.

    An answer that is a class of another task is shown with the name of that task.

    Args:
        panel: the file of `write_examples`; at most 8 images of a task are drawn.
        path: the PNG to write.

    Raises:
        UserError: a file of another kind.
    """
    arrays = read_panel(panel, "examples")
    arms = arrays["arms"].tolist()
    tasks = arrays["tasks"].tolist()
    bands = {task: np.flatnonzero(arrays["tasks"] == task)[:SHOWN].tolist() for task in dict.fromkeys(tasks)}
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
    return save(figure, path)


CAPTION = (
    "Evaluated images evenly over each task, not chosen by result; answers of the first seed. ✓ right, ✗ wrong; an answer of "
    "another task is named with it."
)


def sections(folder: Path) -> list[Section]:
    """Return the section of images, as far as the run folder has the files."""
    pictures = []
    if (folder / EXAMPLES).exists():
        path = examples_figure(folder / EXAMPLES, folder / "figures" / "examples.png")
        pictures.append(Picture(path, "Examples", CAPTION))
    return [Section("Images", pictures=[*pictures, *router_pictures(folder)], folded=True)]
