"""The report section of a multi-task run: examples with answers, and maps of routers."""

from __future__ import annotations

from pathlib import Path

from vismt.jobs.classification.figures import examples_figure
from vismt.jobs.classification.panels import EXAMPLES
from vismt.report.routers import router_pictures
from vismt.report.sections import Picture, Section

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
