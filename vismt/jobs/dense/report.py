"""What a report shows of a dense run beside the shared sections: predictions beside their truth, and maps of routers."""

from __future__ import annotations

from pathlib import Path

from vismt.jobs.dense.config import PANELS
from vismt.jobs.dense.figures import predictions_figure
from vismt.report.routers import router_pictures
from vismt.report.sections import Picture, Section

CAPTION = (
    "Evaluated images evenly over the set, not chosen by result; predictions of the first seed, merged. Below each the score of "
    "this image alone, – where it has none. Depth in the colours of its truth. Dark grey: no value. An empty place: the arm does "
    "not train the task."
)


def sections(folder: Path) -> list[Section]:
    """Return the section of images, as far as the run left the files."""
    pictures = []
    if (folder / PANELS).exists():
        path = predictions_figure(folder / PANELS, folder / "figures" / "predictions.png")
        pictures.append(Picture(path, "Predictions", CAPTION))
    return [Section("Images", pictures=[*pictures, *router_pictures(folder)], folded=True)]
