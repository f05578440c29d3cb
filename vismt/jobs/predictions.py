"""Inputs and outputs of `vismt predict` in every job: image files, predictions.csv with classes of images, a contact sheet.

A row of predictions.csv is the answer of one softmax for one image: the likeliest class, the next classes, and their
probabilities. If the run has the thresholds of `evaluate.risk`, the row also has the conformal set as a JSON list. An image of
a folder of class folders has its true class too, and the accuracy over all of them is printed. The row of a file that cannot be
read has the error in place of an answer.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, near
from vismt.config.sections import RESOLVED
from vismt.data.decode import IMAGE_SUFFIXES, decode_file, is_image_name
from vismt.data.pixels import crop_square
from vismt.engine import runtime
from vismt.report.panels import write_arrays
from vismt.report.tables import interval_text
from vismt.report.tiles import Tile, TileRow, draw_tiles
from vismt.storage.files import atomic_write, check_name
from vismt.storage.outputs import check_folder_outputs, check_outputs, note_outputs
from vismt.storage.records import Row
from vismt.uncertainty.intervals import SHARE, Measure, interval_kind_text

PREDICTIONS = "predictions"  # of a run
TABLE, SHEET, _ARRAYS = "predictions.csv", "predictions.png", "predictions.npz"
_BATCH = 32  # images in one batch if no configuration says it
MOST_SHOWN, _COLUMNS = 96, 8  # images of a contact sheet, and of a row of it


@dataclass(frozen=True)
class Options:
    """Options of a prediction. Most belong only to some jobs.

    Args:
        arm: Arm and its seed, "arm:seed", or an evaluated model of a few-shot run.
        support: Folder with a folder of example images for each class.
        top: Number of classes in a row.
        sheet: Whether the images are drawn with their answers.
        maps: Whether arrays are written: all probabilities, or the maps of a dense run with pictures.
        own_size: Whether images are predicted at their own size.
        flip: Whether the prediction is averaged with the mirrored image.
        temperature: Temperature of sampled text. 0 takes the likeliest token.
        new_tokens: Longest text, in tokens.
        seed: Seed of sampled text.
    """

    arm: str | None = None
    support: Path | None = None
    top: int = 5
    sheet: bool = False
    maps: bool = False
    own_size: bool = False
    flip: bool = False
    temperature: float = 0.0
    new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("new_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise UserError(f"predict: {name} {getattr(self, name)}; it must be at least {least}.")

    def check(self, taken: Iterable[str], what: str) -> None:
        """Raise UserError for an option that is set and not among `taken`. what: Name of the model."""
        for item in fields(self):
            if item.name not in taken and getattr(self, item.name) != item.default:
                name = item.name.replace("_", "-")
                known = ", ".join(sorted(key.replace("_", "-") for key in taken))
                raise UserError(
                    f"predict: {name} is for {USED_BY[item.name]}, and {what} does not use it; leave it out. Known: {known}."
                )


CLASSES = frozenset({"arm", "top", "sheet", "maps"})  # options of everything that classifies images
USED_BY = {
    "arm": "run folders",
    "support": "few-shot runs and backbones without classes",
    "top": "models that choose among classes",
    "sheet": "classes of images",
    "maps": "images",
    "own_size": "dense runs",
    "flip": "dense runs",
    "temperature": "text that a language model writes",
    "new_tokens": "text that a language model writes",
    "seed": "text that a language model writes",
}


@dataclass(frozen=True)
class Predictions:
    """The answers and files of a prediction.

    Attributes:
        rows: Answers by image (or row of text), as in the table. An image without an answer has the key error.
        files: Written files.
        answered: Number of images or rows with an answer.
        failed: Error of each image or row without an answer.
        left_out: Number of the other files in the named folders, by the reason.
        accuracy: Share of images of class folders that are classified right, with its 95 % interval and the number of images:
            the keys value, low, high and n. None if the images are in no class folders.
    """

    rows: list[Row]
    files: list[Path]
    answered: int
    failed: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] | None = None

    @property
    def counts(self) -> str:
        """How many images or rows were seen, and what became of them."""
        seen = self.answered + len(self.failed) + sum(self.left_out.values())
        others = "".join(f"   {count:,} left out: {reason}" for reason, count in self.left_out.items())
        return f"{seen:,} seen   {self.answered:,} answered   {len(self.failed):,} failed{others}"


@dataclass(frozen=True)
class Softmax:
    """The classes of a net among which one answer is chosen.

    Args:
        span: Outputs of the classes.
        names: Names of the classes.
        tasks: Task of each class.
        quantile: Largest -log p of a class in the conformal set. None for no set.
    """

    span: slice
    names: Sequence[str]
    tasks: Sequence[str]
    quantile: float | None = None


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a prediction.

    Args:
        places: Path of each file below the folder that was named, by its path.
        left_out: Number of the other files in the named folders, by the reason.
    """

    places: dict[Path, Path]
    left_out: Counter[str]


def image_files(paths: Iterable[Path], target: Path) -> ImageFiles:
    """Return the files of `paths`, sorted by name. A folder stands for the image files in it and in the folders below it.

    target: Folder of the answers, whose files are left out. Raises UserError for a folder without an image.
    """
    found = ImageFiles({}, Counter())
    for path in paths:
        check_name(path)
        if not path.is_dir():
            found.places[path] = Path(path.name)
            continue
        count = len(found.places)
        for file in sorted(path.rglob("*")):
            place, is_folder = file.relative_to(path), file.is_dir() and not file.is_symlink()
            reason = _left_out(place, written=target != path and target in file.parents)
            if is_folder:
                reason = "" if os.access(file, os.R_OK | os.X_OK) else "folders that cannot be opened"
            if reason:
                found.left_out[reason] += 1
            elif not is_folder:
                found.places[file] = place
        if len(found.places) == count:
            raise UserError(
                f"predict: '{path}' has no image file ({', '.join(sorted(IMAGE_SUFFIXES))}); name another folder."
            )
    return found


def _left_out(place: Path, written: bool) -> str:
    """Return the reason why a file of a folder is left out, "" for an image. written: Whether it is below the target."""
    if any(part.startswith((".", "__")) for part in place.parts):
        return "hidden files"
    if written:
        return "files of a prediction"
    return "" if is_image_name(place.name) else "files without the name of an image"


def read_image(path: Path) -> Tensor | Row:
    """Return an image as uint8 (3, h, w), or the row of an image that cannot be read."""
    shown = console.printable(str(path))
    try:
        if shown != str(path):
            raise UserError(f"the name of '{shown}' is not UTF-8; rename the file.")
        return decode_file(path, fix="Replace the file.")
    except UserError as error:
        return {"image": shown, "error": str(error)}


def check_target(target: Path, outputs: Iterable[tuple[str, str]], inputs: Iterable[Path]) -> None:
    """Raise UserError unless a prediction may write its outputs, given by name and image, into `target`."""
    if _of_run(target):
        paths = [(target / name, source) for name, source in outputs]
        check_outputs("predict", paths, inputs, own={path for path, _ in paths})
    else:
        check_folder_outputs("predict", target, outputs, inputs)


def note_target(target: Path, names: Iterable[str]) -> None:
    """Note the outputs of a prediction in `target`, unless it is the folder of predictions of a run."""
    if not _of_run(target):
        note_outputs("predict", target, names)


def _of_run(target: Path) -> bool:
    return target.name == PREDICTIONS and (target.parent / RESOLVED).exists()


def images_for(inputs: Sequence[Path], target: Path, options: Options) -> ImageFiles:
    """Return the images whose classes are to be predicted into a folder, after a check of what will be written there."""
    images = image_files(inputs, target)
    check_target(target, [(name, "") for name in _class_outputs(options)], images.places)
    return images


def _class_outputs(options: Options) -> list[str]:
    return [TABLE, *([_ARRAYS] if options.maps else []), *([SHEET] if options.sheet else [])]


@torch.no_grad()
def predict_classes(
    net: nn.Module,
    size: int,
    groups: Sequence[Softmax],
    images: ImageFiles,
    target: Path,
    options: Options,
    *,
    label: str,
    batch: int = _BATCH,
) -> Predictions:
    """Write the classes of images to <target>/predictions.csv.

    `options.maps` adds the probabilities of all classes in predictions.npz, and `options.sheet` the contact sheet. One batch of
    images at a time is in memory.

    Args:
        net: Function from images (b, 3, size, size) in [0, 1] to logits (b, k), on the device of this process.
        size: Size of the images in pixels. Other images are resized by their shorter side and cropped to the centre, as in
            evaluation.
        groups: Softmaxes, which together have all k outputs in their order. Each has a row.
        images: Images, as `images_for` returns them.
        label: Name of the model in the progress bar.
    """
    device, files = runtime.processes().device, list(images.places)
    answers: dict[Path, list[Row]] = {}
    failed: dict[Path, Row] = {}
    right: dict[str, float] = {}
    probabilities: list[Tensor] = []
    shown: list[np.ndarray] = []
    starts = range(0, len(files), batch)
    for start in console.track(starts, "predict", label, len(starts)):
        read = {path: read_image(path) for path in files[start : start + batch]}
        failed |= {path: row for path, row in read.items() if isinstance(row, dict)}
        squares = {path: crop_square(image, size) for path, image in read.items() if isinstance(image, Tensor)}
        if not squares:
            continue
        pixels = torch.stack([*squares.values()])
        logits = net(pixels.to(device, torch.float32) / 255).cpu().double()
        log_p = [logits[:, group.span].log_softmax(1) for group in groups]
        for place, path in enumerate(squares):
            folder = images.places[path].parent.name
            for group, values in zip(groups, log_p):
                task = group.tasks[int(values[place].argmax())]
                row = class_row(path, task, values[place], group.names, group.quantile, options.top)
                true = [name for name in group.names if folder and folder in (name, name.partition("/")[2])]
                if true:
                    right[f"{path} {group.span.start}"] = float(row["label"] in true)
                answers.setdefault(path, []).append({**row, "true_label": true[0]} if true else row)
        if options.maps:
            probabilities.append(torch.cat(log_p, 1).exp())
        shown += [*pixels[: MOST_SHOWN - len(shown)].numpy()] if options.sheet else []
    rows = [row for path in files for row in answers.get(path) or [failed[path]]]
    labels = [name for group in groups for name in group.names]
    note_target(target, _class_outputs(options))
    written = [write_rows(rows, target)]
    if options.maps:
        names = {"images": [str(path) for path in answers], "labels": labels}
        arrays = {name: np.array(texts) for name, texts in names.items()}
        arrays["probabilities"] = torch.cat([torch.empty(0, len(labels)), *probabilities]).float().numpy()
        written.append(write_arrays(target / _ARRAYS, arrays))
    if options.sheet and answers:
        written.append(draw_answers(shown, [*answers.values()], target / SHEET))
    errors = [str(row["error"]) for row in failed.values()]
    accuracy = _accuracy(right, [images.places[path].parent.name for path in answers], labels)
    return Predictions(rows, written, len(answers), errors, dict(images.left_out), accuracy)


def _accuracy(right: Mapping[str, float], folders: Sequence[str], labels: Sequence[str]) -> dict[str, float] | None:
    """Print and return the accuracy of images in class folders. Print the folders whose name is not a class as well."""
    classes = {name for label in labels for name in (label, label.partition("/")[2])}
    others = [folder for folder in folders if folder and folder not in classes]
    found = None
    if right:
        measure = Measure("accuracy", right, counts=True)
        low, high = measure.interval()
        found = {"value": measure.score, "low": low, "high": high, "n": len(right)}
        text = interval_text(measure.score, low, high, SHARE)
        console.stage(
            "predict", f"accuracy {text} %   (n = {len(right):,} images; {interval_kind_text(measure.covers)})"
        )
    if others:
        first = others[0]
        text = f"{len(others):,} images are not counted: the model has no class '{first}'.{near(first, classes - {''})}"
        console.stage("predict", text)
    return found


def class_row(
    image: Path, task: str, log_p: Tensor, names: Sequence[str], quantile: float | None, top: int = Options.top
) -> Row:
    """Return the row of one image, whose task answers with log-probabilities (k,) of the classes.

    quantile: Largest -log p of a class in the conformal set. None for no set. top: Number of classes.
    """
    return {"image": str(image), "task": task, **choice_row(log_p, names, quantile, top)}


def choice_row(log_p: Tensor, names: Sequence[str], quantile: float | None, top: int) -> Row:
    """Return the columns of the `top` likeliest of k choices and of the conformal set. Arguments are as in `class_row`."""
    order = log_p.argsort(descending=True, stable=True).tolist()
    row: Row = {}
    for place, label in enumerate(order[:top], 1):
        ending = "" if place == 1 else f"_{place}"
        row |= {f"label{ending}": names[label], f"probability{ending}": float(log_p[label].exp())}
    if quantile is not None:
        row["set"] = json.dumps([names[label] for label in order if -log_p[label] <= quantile], ensure_ascii=False)
    return row


def write_rows(rows: Sequence[Row], target: Path) -> Path:
    """Write the rows of all images to <target>/predictions.csv and return its path."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO()
    # Python before 3.13 does not quote a carriage return, at which readers would begin another row.
    returns = any("\r" in value for row in rows for value in row.values() if isinstance(value, str))
    table = csv.DictWriter(
        text, list(columns), lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    )
    table.writeheader()
    table.writerows(rows)
    atomic_write(target / TABLE, text.getvalue())
    return target / TABLE


def draw_answers(images: Sequence[np.ndarray], answers: Sequence[Sequence[Row]], path: Path) -> Path:
    """Draw the first images uint8 (3, h, w), each with its file above and its likeliest classes in % below. Return `path`.

    answers: Rows of every image. Rows beyond the images are counted in the last line.
    """
    tiles = [
        Tile(
            image,
            Path(str(rows[0]["image"])).name,
            [(f"{100 * float(row['probability']):.0f} % {row['label']}", None) for row in rows],
        )
        for image, rows in zip(images, answers)
    ]
    left_out = len(answers) - len(images)
    more = f"; {left_out:,} more are in {TABLE}" if left_out else ""
    note = f"The first {len(images)} of {len(answers):,} images, with the likeliest class and its probability{more}."
    return draw_tiles([TileRow(tiles[at : at + _COLUMNS]) for at in range(0, len(tiles), _COLUMNS)], path, note)
