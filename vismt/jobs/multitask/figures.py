"""What only the report of a multi-task run shows: images with the answers of the arms, predicted maps, and maps of routers.

The evaluation writes examples and maps to files of the run folder, and the report draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import Sample, collate
from vismt.engine.log import record_stem
from vismt.engine.study import ARMS, Training
from vismt.jobs.multitask.config import PANELS
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.maps_data import DenseData
from vismt.jobs.multitask.maps_evaluation import CLASS_NAMES, NUMBERS, UNDEFINED
from vismt.jobs.multitask.models import fingerprint
from vismt.jobs.multitask.pooled_score import PooledScore
from vismt.multitask.tasks import MapTask
from vismt.multitask.tasks.base import DARK
from vismt.report.arm_figures import LETTER
from vismt.report.confusion import confusion_figure, write_confusion
from vismt.report.panels import read_panel, spread, to_bytes, write_arrays
from vismt.report.plotting import (
    MUTED,
    axes_at,
    legend,
    legend_rows,
    new_figure,
    save_figure,
    short,
    show_image,
    write,
)
from vismt.report.results import RECORDS
from vismt.report.routers import router_pictures
from vismt.report.tables import Picture, Section, Table, number_text, scale_text
from vismt.report.tiles import Tile, TileRow, draw_tiles
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import HIGHER, LOWER, NUMBER, SHARE

EXAMPLES_FILE = "examples.npz"
PER_TASK, _SHOWN = 6, 8  # images that are written, and the most that are drawn


def examples(
    folder: Path, data: TaskData, split: str, trainings: Sequence[Training], path: Path, count: int = PER_TASK
) -> Path:
    """Write `count` evaluated images of each task, evenly over its images, with the answers of trainings of several arms.

    The answers are read from the records, and nothing is evaluated. Raises UserError for an image without a record of an arm.
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
    """Write images uint8 (n, 3, h, w), the names of their classes, and the answers of each arm. Return `path`."""
    arrays = {
        "images": images,
        "truth": np.array(list(truth), dtype=str),
        "tasks": np.array(list(tasks), dtype=str),
        "arms": np.array(list(predictions), dtype=str),
    }
    answers = np.array([list(names) for names in predictions.values()], dtype=str)
    return write_arrays(path, {**arrays, "predictions": answers})


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

    An answer that is a class of another task is shown with the name of that task. At most 8 images of a task are drawn. panel:
    File of `write_examples`.
    """
    arrays = read_panel(panel)
    arms, truth = arrays["arms"].tolist(), arrays["truth"].tolist()
    rows = []
    for task in dict.fromkeys(arrays["tasks"].tolist()):
        tiles = []
        for at in np.flatnonzero(arrays["tasks"] == task)[:_SHOWN].tolist():
            given = arrays["predictions"][:, at].tolist()
            answers = [(answer.removeprefix(f"{task}/"), answer == truth[at]) for answer in given]
            tiles.append(Tile(arrays["images"][at], truth[at].removeprefix(f"{task}/"), answers))
        rows.append(TileRow(tiles, task, lines=arms))
    return draw_tiles(rows, path)


EXAMPLES_CAPTION = (
    "Test images at even distances in each task, not chosen by result; answers of the first seed. ✓ right, ✗ wrong; an answer "
    "from another task stands with the name of that task."
)


_MOST_CLASSES = 40  # of a matrix that is drawn
CONFUSION_CAPTION = (
    "Rows: true class. Columns: answer. Each number is the share of the pixels of the class in %, first seed."
)
UNDEFINED_NOTE = "A score without a number has no row in the tables of results, and its arm has no delta_m."

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS = 4  # images
_SIDE, _WIDEST, GAP = 1.35, 11.0, 0.07  # inches: of a square picture, of a figure, between pictures
# Inches of the names over a block, a task over its row, scores, between blocks.
_HEAD, _LINE, BELOW, _APART = 0.22, 0.22, 0.19, 0.3


def write_predictions(
    path: Path,
    data: DenseData,
    split: str,
    trainings: Sequence[Training],
    logits: Callable[[Training, Sample], Mapping[str, Tensor]],
    pooled: Callable[[Training], Mapping[str, PooledScore]],
) -> Path | None:
    """Write _MAPS evaluated images, evenly over their split, not chosen by result, with what every training predicts.

    Only tasks with a value at every pixel are drawn. Without such a task, None is returned and no file is written. A file of
    the same images and trainings is kept, and nothing is predicted. The arrays:

        truth (t, n, 3, h, w), predictions (a, t, n, 3, h, w): Pictures by MapTask.picture, of the first seed of each arm,
        merged. A
            prediction has the colours of its truth.
        scores (a, t, n): Score of the single image, NaN for no score. trained (a, t): Whether the arm has the task. Without it
        the pictures are dark grey and the scores NaN. trainings (a,): Digests of the trainings. classes, colors (c,): Classes
        and colours of the truth in the pictures, the commonest first, at most _MOST_CLASSES of a task.

    logits: Function that returns the outputs of a training on a batch by task. pooled: Function that returns the images of a
    training by task.
    """
    tasks = [task for task in data.tasks.values() if isinstance(task, MapTask)]
    if not tasks:
        return None
    rows = data.part(split)
    numbers = spread(len(rows), _MAPS).tolist()
    about = {
        "ids": np.array([rows.ids[i] for i in numbers], dtype=str),
        "arms": np.array([training.arm for training in trainings], dtype=str),
        "trainings": np.array([fingerprint(training) for training in trainings], dtype=str),
    }
    if _known(path, about):
        return path
    sample = collate([rows.fitted(i, data.size) for i in numbers])
    colors = [pair for task in tasks if task.key in sample for pair in task.legend(sample[task.key])[:_MOST_CLASSES]]
    predictions, trained, scores = [], [], []
    for training in trainings:
        outputs, pools = logits(training, sample), pooled(training)
        trained.append([task.name in outputs for task in tasks])
        predictions.append(
            np.stack([_pictures(task, outputs.get(task.name), sample["image"], sample.get(task.key)) for task in tasks])
        )
        scores.append(
            [
                [pools[task.name].alone(rows.ids[i]) if task.name in pools else math.nan for i in numbers]
                for task in tasks
            ]
        )
    return write_arrays(
        path,
        {
            **about,
            "images": to_bytes(sample["image"]),
            "tasks": np.array([task.name for task in tasks], dtype=str),
            "metrics": np.array([task.headline.name for task in tasks], dtype=str),
            "shares": np.array([task.headline.share for task in tasks]),
            "lower_is_better": np.array([task.headline.lower_is_better for task in tasks]),
            "truth": np.stack([_pictures(task, sample.get(task.key), sample["image"]) for task in tasks]),
            "trained": np.array(trained),
            "predictions": np.stack(predictions),
            "scores": np.array(scores, dtype=np.float64),
            "classes": np.array([name for name, _ in colors], dtype=str),
            "colors": np.array([color for _, color in colors], dtype=str),
        },
    )


def _known(path: Path, about: dict[str, np.ndarray]) -> bool:
    try:
        arrays = read_panel(path)
    except UserError:
        return False
    return all(name in arrays and arrays[name].tolist() == expected.tolist() for name, expected in about.items())


def _pictures(task: MapTask, maps: Tensor | None, images: Tensor, like: Tensor | None = None) -> np.ndarray:
    """Return pictures uint8 (n, 3, h, w) of a batch of maps. Without maps, no pixel has a value."""
    if maps is None:
        return np.full(tuple(images.shape), DARK, dtype=np.uint8)
    references = [None] * len(maps) if like is None else like
    return np.stack([task.picture(map, reference).numpy() for map, reference in zip(maps, references, strict=True)])


def predictions_figure(panel: Path, path: Path) -> Path:
    """Draw a block for each image: the input, and for each task the truth and each arm's prediction, its score below.

    Narrow blocks are side by side. An arm that does not train a task leaves its place empty. panel: File of `write_predictions`.
    """
    arrays = read_panel(panel)
    count, _, rows, columns = arrays["images"].shape
    pictures = 2 + len(arrays["arms"])
    width = min(_SIDE * math.sqrt(columns / rows), (_WIDEST - 0.2) / pictures - GAP)
    size = (width, width * rows / columns)
    wide, high = (
        pictures * (width + GAP) - GAP + _APART,
        _HEAD + len(arrays["tasks"]) * (_LINE + size[1] + BELOW) + _APART / 2,
    )
    across = max(1, min(count, int((_WIDEST - 0.2 + _APART) / wide)))
    total, classes = 0.2 + across * wide - _APART, arrays["classes"].tolist()
    top = 0.05 + (0.12 + 0.22 * legend_rows(classes, total - 0.1) if classes else 0)
    figure = new_figure(total, top + high * math.ceil(count / across))
    if classes:
        legend(figure, classes, arrays["colors"].tolist(), 0.1)
    for number in range(count):
        down, right = divmod(number, across)
        _block(figure, arrays, number, 0.1 + right * wide, top + down * high, size)
    return save_figure(figure, path)


def _block(
    figure: Figure, arrays: Mapping[str, np.ndarray], number: int, left: float, top: float, size: tuple[float, float]
) -> None:
    """Draw one image at inches from the upper left corner. size: Size (width, height) of a picture."""
    (width, height), arms = size, arrays["arms"].tolist()
    pitch, most = width + GAP, max(4, int(width / LETTER))
    for place, name in enumerate(["Input", "Truth", *arms]):
        write(
            figure, left + place * pitch, top + _HEAD - 0.03, short(name, int(most * 0.85)), va="bottom", weight="bold"
        )
    for row, metric in enumerate(arrays["metrics"].tolist()):
        y = top + _HEAD + _LINE + row * (_LINE + height + BELOW)
        scale = SHARE if arrays["shares"][row] else NUMBER
        better = LOWER if arrays["lower_is_better"][row] else HIGHER
        title = f"{arrays['tasks'][row]} {scale_text(metric, scale, better)}"
        title = short(title, int((1 + len(arms)) * pitch / LETTER))
        write(figure, left + pitch, y - 0.05, title, va="bottom", color=MUTED, fontsize=8.5)
        if row == 0:
            show_image(axes_at(figure, left, y, width, height), arrays["images"][number])
            name = arrays["ids"][number].rpartition("/")[2]
            write(figure, left, y + height + 0.04, short(name, most), va="top", color=MUTED, fontsize=8.5)
        show_image(axes_at(figure, left + pitch, y, width, height), arrays["truth"][row, number])
        for place in (at for at in range(len(arms)) if arrays["trained"][at, row]):
            x, score = left + (2 + place) * pitch, float(arrays["scores"][place, row, number])
            show_image(axes_at(figure, x, y, width, height), arrays["predictions"][place, row, number])
            text = "–" if math.isnan(score) else number_text(score, scale)
            write(figure, x, y + height + 0.04, text, va="top", fontsize=8.5)


MAPS_CAPTION = (
    "Images at even distances in the test set, not chosen by result; predictions of the first seed, merged. The score of this "
    "image alone stands below each prediction, – where it has none. Depth has the colours of its target. Dark grey: no value. "
    "An empty place: the arm does not train the task."
)


def confusions(folder: Path, trainings: Sequence[Training], split: str) -> Section:
    """Return the section of the confusion matrices of pixels, one for each training and task with classes."""
    pictures = []
    for training in trainings:
        path = training.folder / RECORDS / f"{split}{NUMBERS}"
        if not path.exists():
            continue
        found = read_numbers(path)
        for task, names in found[CLASS_NAMES].items():
            matrix = found["numbers"].get(task, {}).get("confusion")
            if matrix is not None and len(names) <= _MOST_CLASSES:
                target = folder / "figures" / f"{record_stem('confusion', task, training.arm)}.svg"
                drawn = confusion_figure(np.array(matrix), names, names, target)
                pictures.append(Picture(drawn, f"{task}, answers of {training.arm}", CONFUSION_CAPTION))
    return Section("Confusion of pixels", pictures=pictures, folded=True)


def read_numbers(path: Path) -> dict[str, Any]:
    """Return the numbers, the undefined scores and the names of the classes of an evaluation, by task."""
    types = {"numbers": dict, UNDEFINED: dict[str, str], CLASS_NAMES: dict[str, list[str]]}
    return read_sealed(path, f"'{path}'", types)


def sections(folder: Path) -> list[Section]:
    """Return the sections of undefined scores and of images, as far as the run left the files."""
    pictures = []
    if (folder / EXAMPLES_FILE).exists():
        path = examples_figure(folder / EXAMPLES_FILE, folder / "figures" / "examples.svg")
        pictures.append(Picture(path, "Examples", EXAMPLES_CAPTION))
    if (folder / PANELS).exists():
        path = predictions_figure(folder / PANELS, folder / "figures" / "predictions.svg")
        pictures.append(Picture(path, "Predictions", MAPS_CAPTION))
    images = Section("Images", pictures=[*pictures, *router_pictures(folder)], folded=True)
    rows = []
    for path in sorted((folder / ARMS).glob(f"*/*/{RECORDS}/*{NUMBERS}")):
        training, name = path.parent.parent.relative_to(folder / ARMS), path.name.removesuffix(NUMBERS)
        rows += [[str(training), name, task, reason] for task, reason in read_numbers(path)[UNDEFINED].items()]
    table = Table("Scores that are undefined", ["Training", "Evaluation", "Task", "Reason"], rows, set(), texts=4)
    return [Section("Undefined scores", [(table, UNDEFINED_NOTE)]), images] if rows else [images]
