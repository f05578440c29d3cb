"""`vismt predict` for maps: images of any size through a trained run. Each image becomes one picture, on request with its maps.

Tasks of whole images also write predictions.csv (jobs/predictions.py). The maps of an image are an array for each task in one
.npz, and two PNG files of the image's size for each task of maps: the map in its colours, and the map half transparent over the
image.

An image is fitted into the canvas of the run as in evaluation, so that the net sees the camera that it knows. With `own_size`,
it is taken at its own resolution by windows of the trained size. Depth is in the unit of the training data. The prediction for
an image s times as large as the fitted image is s times too near (dense_transforms.py). It is multiplied by s, and inverse
depth is divided by s.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.cards import load_card
from vismt.data.image_set import readable_names
from vismt.data.maps.dense_set import DenseSource, open_samples
from vismt.data.maps.dense_transforms import fitting, resize
from vismt.data.set_entries import card_and_split
from vismt.engine import runtime
from vismt.jobs.multitask.config import MultitaskConfig, all_tasks, canvas_of, own_parts, trained_tasks
from vismt.jobs.predictions import (
    TABLE,
    ImageFiles,
    Options,
    Predictions,
    class_row,
    note_target,
    read_image,
    write_rows,
)
from vismt.multitask.inference import predict
from vismt.multitask.nets import SEGMENTATION, DenseNet
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import Classification, UnionClassification
from vismt.multitask.tasks.maps import Depth, InverseDepth
from vismt.report.panels import write_arrays
from vismt.report.plotting import INK, MUTED, axes_at, new_figure, save_figure, short, show_image, write
from vismt.storage.files import JsonObject, atomic_write
from vismt.storage.records import Row

THIN = 16  # a picture's height is in proportion to that of the image: at 1 x 300 pixels it took 4 GB
VALUES = 2**29  # 2 GiB of predictions, of which there are several copies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _LINE, _MOST = 2.6, 0.18, 8  # inches: of a panel, and of a line of the legend; classes in the legend


@dataclass(frozen=True)
class Panel:
    """One picture, with its name and caption, pixels uint8 (3, h, w), and pairs (class name, colour) for the legend."""

    name: str
    caption: str
    pixels: Tensor
    legend: list[tuple[str, str]]


def most_pixels(config: MultitaskConfig) -> int:
    """Return the pixels of the largest image whose predictions at its own size, for the largest scale, are VALUES numbers."""
    channels = sum(task.channels for task in trained_tasks(config))
    return int(VALUES / channels / max(1, *config.evaluate.scales) ** 2)


def stem(place: Path) -> str:
    """Return how the names of the files of an image begin. place: Path of the image below the folder that was named."""
    return "-".join([*place.parent.parts, place.stem])


def output_names(images: Mapping[Path, Path], tasks: Mapping[str, Task], maps: bool) -> Iterator[tuple[str, str]]:
    """Yield the name of each file that a prediction writes, with its image.

    images: Path of each image below the folder that was named. maps: Whether the maps are also written.
    """
    for path, place in images.items():
        endings = [".png"]
        if maps:
            endings += [".npz", *(ending for name, task in tasks.items() for ending in _map_endings(name, task))]
        yield from ((f"{stem(place)}{ending}", str(path)) for ending in endings)
    yield TABLE, "the rows of all images"


def _map_endings(name: str, task: Task) -> list[str]:
    """Return the endings of the names of the pictures of a map, after the image's stem. A task of whole images has none."""
    return [f"-{name}.png", f"-{name}-overlay.png"] if isinstance(task, MapTask) else []


def drawable(path: Path, most: int | None = None) -> Tensor | Row:
    """Return an image as uint8 (3, h, w), or the row of an image that cannot be read, is thin or has more than `most` pixels."""
    image, reason = read_image(path), ""
    if isinstance(image, Tensor):
        height, width = image.shape[-2:]
        if max(height, width) > THIN * min(height, width):
            reason = f"one side may be {THIN} times the other. Crop it."
        elif most is not None and height * width > most:
            reason = f"at their own size this run takes up to {most:,} pixels. Scale it down, or leave out --own-size."
        if reason:
            return {"image": str(path), "error": f"{path}: has {width:,} x {height:,} pixels; {reason}"}
    return image


def predict_images(
    config: MultitaskConfig,
    net: DenseNet,
    tasks: Mapping[str, Task],
    classes: Mapping[str, Sequence[str]],
    label: str,
    images: ImageFiles,
    target: Path,
    options: Options,
    quantiles: Mapping[str, float],
) -> Predictions:
    """Write <target>/<image's stem>.png for each `drawable` image, and rows in <target>/predictions.csv.

    A row has the class of an image in each task of whole images. Without such a task it has the name of the picture.

    Args:
        tasks: Trained tasks by name.
        classes: Names of the classes by task.
        label: Name of the training for the progress bar.
        options: Options of the prediction. own_size takes windows over the image at its own size. flip averages with the mirrored
            image, also if evaluate.flip is false. maps also writes <stem>.npz, with the answer of each task (Task.answer) at
            the size of the picture by the task's name, and <stem>-<task>.png and <stem>-<task>-overlay.png for tasks of maps.
            top is the number of classes in a row.
        quantiles: Largest -log p of a class in a conformal set, by task of whole images.
    """
    device = runtime.processes().device
    net = net.to(device)
    settings = config.evaluate
    flip = options.flip or settings.flip
    written: list[Path] = []
    rows: list[Row] = []
    most = most_pixels(config) if options.own_size else None
    note_target(target, (name for name, _ in output_names(images.places, tasks, options.maps)))
    for path, place in console.track([*images.places.items()], "predict", label):
        found = drawable(path, most)
        if isinstance(found, dict):
            rows.append(found)
            continue
        image = found.to(torch.float32) / 255
        size = (int(image.shape[-2]), int(image.shape[-1]))
        height, width = size
        if not options.own_size:
            height, width = fitting(size, canvas_of(config))
            image = resize({"image": image}, canvas_of(config))["image"]
        with torch.no_grad():
            outputs = predict(
                net, tasks, image[None].to(device), overlap=settings.overlap, flip=flip, scales=settings.scales
            )
        outputs = {
            name: value[0, :, :height, :width].cpu() if value.ndim == 4 else value[0].cpu()
            for name, value in outputs.items()
        }
        if options.own_size:
            enlarged = max(side / fitted for side, fitted in zip(size, canvas_of(config)))
            outputs = {name: tasks[name].rescaled(value, enlarged) for name, value in outputs.items()}
        shown = image[:, :height, :width]
        written.append(draw_predictions(shown, outputs, tasks, classes, target / f"{stem(place)}.png"))
        answers = _class_rows(path, outputs, tasks, classes, quantiles, options.top)
        rows += answers or [{"image": str(path), "picture": written[-1].name}]
        if options.maps:
            _write_maps(shown, outputs, tasks, target, stem(place))
    failed = [str(row["error"]) for row in rows if "error" in row]
    return Predictions(
        rows, [write_rows(rows, target), *written], len(images.places) - len(failed), failed, dict(images.left_out)
    )


def _class_rows(
    path: Path,
    outputs: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    classes: Mapping[str, Sequence[str]],
    quantiles: Mapping[str, float],
    top: int,
) -> list[Row]:
    """Return the rows of an image in predictions.csv: one for each task of whole images, or one for the union of them.

    The set of a union takes the largest threshold of a task, which covers the images of every task.
    """
    rows = []
    union = [task for task in tasks.values() if isinstance(task, UnionClassification)]
    for task in tasks.values():
        if not isinstance(task, Classification) or task in union[1:]:
            continue
        log_p, quantile = outputs[task.name].double().log_softmax(0), quantiles.get(task.name)
        names = classes.get(task.name) or _numbered(len(log_p))
        answers = task
        if union:
            answers = next(one for one in reversed(union) if one.offset <= int(log_p.argmax()))
            quantile = max(quantiles.values(), default=None)
        rows.append(class_row(path, answers.name, log_p, names, quantile, top))
    return rows


def _write_maps(
    image: Tensor, outputs: Mapping[str, Tensor], tasks: Mapping[str, Task], target: Path, begin: str
) -> None:
    """Write the answers of an image (3, h, w) as arrays, and the pictures of its maps, alone and over the image."""
    answers = {name: tasks[name].answer(value).numpy() for name, value in outputs.items()}
    write_arrays(target / f"{begin}.npz", answers)
    for name, value in outputs.items():
        task = tasks[name]
        if isinstance(task, MapTask):
            colors = task.picture(value)
            mixed = (0.5 * (colors + 255 * image)).round().to(torch.uint8)
            for ending, pixels in zip(_map_endings(name, task), (colors, mixed)):
                buffer = io.BytesIO()
                Image.fromarray(pixels.movedim(0, -1).numpy()).save(buffer, "PNG")
                atomic_write(target / f"{begin}{ending}", buffer.getvalue())


def names_in_sets(config: MultitaskConfig) -> JsonObject:
    """Return what predictions need of the training sets.

    "classes" has the names of the classes of each task: its own, the names on the cards, or of classified images on disk.
    "inverse_depth" says whether depth is inverse depth in all sets. "counted" has the number of classes of tasks with own sets.
    """
    tasks = {task.name: task for task in all_tasks(config)}
    own = {name: getattr(task, "class_names", None) or task.default_class_names for name, task in tasks.items()}
    classes = {name: list(names) for name, names in own.items() if names}
    inverse = False
    entries = [("", entry) for entry in config.data.train]
    entries += [(name, entry) for name, parts in own_parts(config).items() for entry in parts.train]
    for task, entry in entries:
        card = load_card(card_and_split(entry)[0])
        maps = isinstance(card.sources[0], DenseSource)
        inverse |= not task and any(source.inverse_depth for source in card.sources_of(DenseSource))
        given = card.read_names() or []
        # An object names the classes of images by their folders, which are read with the images.
        listed = maps or isinstance(given, list)
        names = readable_names(card, [str(label) for label in range(len(given))]) if given and listed else []
        if not names and not maps:
            with suppress(UserError):  # the images may be on another machine
                names = open_samples(*card_and_split(entry)).image_classes
        task = task or (SEGMENTATION if maps else Classification.name)
        if task in tasks and len(names) == tasks[task].channels:
            classes.setdefault(task, names)
    counted = {name: tasks[name].channels for name in own_parts(config)}
    return {"classes": classes, "inverse_depth": inverse, "counted": counted}


def _numbered(count: int) -> list[str]:
    return [f"class {label}" for label in range(count)]


def named_tasks(config: MultitaskConfig, needed: JsonObject) -> tuple[dict[str, Task], dict[str, list[str]]]:
    """Return the trained tasks by name, and the names of their classes. The names of a union are task/class, for all its tasks.

    needed: What `names_in_sets` returned.
    """
    tasks = {task.name: task for task in trained_tasks(config)}
    depth = tasks.get(Depth.name)
    if isinstance(depth, Depth) and needed["inverse_depth"]:
        tasks[Depth.name] = InverseDepth.of(depth)
    names = {name: labels for name, labels in needed["classes"].items() if name in tasks}
    union = [task for task in tasks.values() if isinstance(task, UnionClassification)]
    joint = [f"{task.name}/{label}" for task in union for label in names.get(task.name) or _numbered(task.classes)]
    return tasks, {**names, **{task.name: joint for task in union}}


def draw_predictions(
    image: Tensor,
    predictions: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    classes: Mapping[str, Sequence[str]],
    path: Path,
) -> Path:
    """Draw the image and each task's prediction side by side, at most four in a row. Return `path`.

    The commonest classes are named by colour. The class of a whole image is named above the image. image: Image, float (3, h,
    w) in [0, 1]. predictions: Prediction (channels, h, w) by task, or (channels,) for the class of the image. classes: Names by
    task. Classes without names are numbered.
    """
    captions = {name: tasks[name].caption(value, classes.get(name, ())) for name, value in predictions.items()}
    whole = [captions[name] for name, value in predictions.items() if value.ndim == 1]
    about = ", ".join(whole) or f"{image.shape[-1]} x {image.shape[-2]} px"
    panels = [Panel("input", about, (255 * image).round().to(torch.uint8), [])]
    for name, value in predictions.items():
        task = tasks[name]
        if isinstance(task, MapTask):
            legend = task.legend(value, classes.get(name, ()))[:_MOST]
            panels.append(Panel(name, captions[name], task.picture(value), legend))
    columns = min(4, len(panels))
    tall = _WIDTH * image.shape[-2] / image.shape[-1]
    bands = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    below = [0.15 + _LINE * max(math.ceil(len(panel.legend) / 2) for panel in band) for band in bands]
    figure = new_figure(0.15 + columns * (_WIDTH + 0.15), len(bands) * (tall + 0.3) + sum(below))
    top = 0.3
    for band, room in zip(bands, below):
        for column, panel in enumerate(band):
            _draw(figure, panel, 0.15 + column * (_WIDTH + 0.15), top, tall)
        top += tall + room + 0.3
    return save_figure(figure, path)


def _draw(figure: Figure, panel: Panel, left: float, top: float, tall: float) -> None:
    """Draw a panel of _WIDTH x tall inches, with its texts above and its legend below."""
    write(figure, left, top - 0.08, panel.name, weight="bold")
    write(figure, left + _WIDTH, top - 0.08, short(panel.caption, 34), color=MUTED, fontsize=8, ha="right")
    show_image(axes_at(figure, left, top, _WIDTH, tall), panel.pixels.numpy(), small=384)
    for number, (text, color) in enumerate(panel.legend):
        row, side = divmod(number, 2)
        x, y = left + side * _WIDTH / 2, top + tall + _LINE * (row + 0.8)
        write(figure, x, y, "■", color=color, fontsize=9)
        write(figure, x + 0.14, y, short(text, 20), color=INK, fontsize=7.5)
