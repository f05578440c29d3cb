"""What a report shows of a dense run beside the shared sections: undefined scores, predictions beside truth, router maps."""

from __future__ import annotations

from pathlib import Path

from vismt.engine.study import ARMS
from vismt.jobs.dense.config import PANELS
from vismt.jobs.dense.evaluation import UNDEFINED
from vismt.jobs.dense.figures import predictions_figure
from vismt.report.results import RECORDS
from vismt.report.routers import router_pictures
from vismt.report.sections import Picture, Section
from vismt.report.tables import Table
from vismt.storage.lines import read_lines

CAPTION = (
    "Evaluated images evenly over the set, not chosen by result; predictions of the first seed, merged. Below each the score of "
    "this image alone, – where it has none. Depth in the colours of its truth. Dark grey: no value. An empty place: the arm does "
    "not train the task."
)


UNDEFINED_NOTE = "A score without a number has no row in the tables of results, and its arm no delta_m."


def sections(folder: Path) -> list[Section]:
    """Return the sections of undefined scores and of images, as far as the run left the files."""
    pictures = []
    if (folder / PANELS).exists():
        path = predictions_figure(folder / PANELS, folder / "figures" / "predictions.png")
        pictures.append(Picture(path, "Predictions", CAPTION))
    images = Section("Images", pictures=[*pictures, *router_pictures(folder)], folded=True)
    rows = _undefined(folder)
    table = Table("Scores that are undefined", ["Training", "Evaluation", "Task", "Reason"], rows, set(), texts=4)
    return [Section("Undefined scores", [(table, UNDEFINED_NOTE)]), images] if rows else [images]


def _undefined(folder: Path) -> list[list[str]]:
    """Return (training, evaluation, task, reason) of every score that is not a number."""
    rows = []
    for path in sorted((folder / ARMS).glob(f"*/*/{RECORDS}/*.jsonl")):
        training = path.parent.parent.relative_to(folder / ARMS)
        for line in read_lines(path):
            rows += [[str(training), path.stem, task, reason] for task, reason in line.get(UNDEFINED, {}).items()]
    return rows
