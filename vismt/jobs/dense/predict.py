"""`vismt predict`: images of any size through a trained dense run; each becomes one picture, on request with its maps.

An image is fitted into the run's canvas as in evaluation, so that the net meets the camera that it knows, or, with `own_size`,
taken at its own resolution by windows of the trained size. Depth is in the unit of the training data: what the net says of an
image s times as large as the fitted one is s times too near (dense_transforms.py), and is multiplied by s, inverse depth divided.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vismt import console
from vismt.data.cards import Card, load_card
from vismt.data.decode import decode_file
from vismt.data.dense_transforms import fitting, resize
from vismt.data.pascal_context import PARTS
from vismt.data.source_types import DENSE, DenseSource
from vismt.engine import runtime
from vismt.engine.arms import Unit, unit_config
from vismt.engine.study_files import fold
from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.jobs.dense.config import DenseConfig, canvas_of, trained_tasks, window_of
from vismt.jobs.dense.models import loaded
from vismt.multitask.inference import predict
from vismt.multitask.tasks import DenseTask, MapTask
from vismt.multitask.tasks.classification import Classification
from vismt.multitask.tasks.depth import Depth, InverseDepth
from vismt.multitask.tasks.segmentation import Segmentation
from vismt.report.plotting import GRID, INK, MUTED, axes_at, new_figure, save, short, write

WIDTH, LINE, MOST = 2.6, 0.18, 8  # inches: of a panel, and of a line of the legend; classes in the legend


def predict_images(
    config: DenseConfig,
    unit: Unit,
    images: Sequence[Path],
    target: Path,
    *,
    own_size: bool = False,
    flip: bool = False,
    maps: bool = False,
) -> list[Path]:
    """Write <target>/<image's stem>.png, with `maps` also .npz, for each image; the pictures' paths.

    flip: the mean with the mirrored image also where evaluate.flip is false. The maps: what each task answers
    (DenseTask.answer) at the size of the picture, by the task's name. Raises UserError before anything is written for files that
    cannot be read and two images of one name.
    """
    names: dict[str, Path] = {}
    for path in images:
        other = names.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"predict: '{other}' and '{path}' would both become {path.stem}.png; give one of them another --to."
            )
        decode_file(path)
    size = (config.size[0], config.size[1]) if own_size else window_of(config)
    net = fold(loaded(config, unit, size), unit).to(runtime.processes().device)
    tasks = {task.name: task for task in trained_tasks(unit_config(config, unit))}
    depth = tasks.get(Depth.name)
    if depth is not None and _inverse(config):
        depth = tasks[Depth.name] = InverseDepth.of(depth)
    classes, flip, written = class_names(config, tasks), flip or config.evaluate.flip, []
    for path in console.track(images, "predict", f"{unit.arm} seed {unit.seed}"):
        image = decode_file(path).to(torch.float32) / 255
        height, width = own = tuple(image.shape[-2:])
        if not own_size:
            height, width = fitting(own, canvas_of(config))
            image = resize({"image": image}, canvas_of(config))["image"]
        with torch.no_grad():
            found = predict(
                net, tasks, image[None].to(runtime.processes().device), overlap=config.evaluate.overlap, flip=flip
            )
        found = {
            name: value[0, :, :height, :width].cpu() if value.ndim == 4 else value[0].cpu()
            for name, value in found.items()
        }
        if own_size and depth is not None:
            larger = max(side / fitted for side, fitted in zip(own, canvas_of(config)))
            found[Depth.name] = depth.rescaled(found[Depth.name], larger)
        written.append(picture(image[:, :height, :width], found, tasks, classes, target / f"{path.stem}.png"))
        if maps:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **{name: tasks[name].answer(value).numpy() for name, value in found.items()})
            atomic_write(target / f"{path.stem}.npz", buffer.getvalue())
    return written


def class_names(config: DenseConfig, tasks: Mapping[str, DenseTask]) -> dict[str, list[str]]:
    """Names of the classes of each task that the cards of the training sets name; the sets themselves need not be here."""
    found: dict[str, list[str]] = (
        {"parts": list(PARTS)} if "parts" in tasks and tasks["parts"].channels == len(PARTS) else {}
    )
    for card in _cards(config):
        told = [str(one) for one in card.read_json(card.names)] if card.names else []
        task = "semseg" if isinstance(card.sources[0], DENSE) else Classification.name
        if task in tasks and len(told) == tasks[task].channels:
            found.setdefault(task, told)
    return found


def _cards(config: DenseConfig) -> list[Card]:
    """Of the training sets."""
    return [load_card(name.partition(":")[0]) for name in config.data.train]


def _inverse(config: DenseConfig) -> bool:
    """Whether the training sets hold inverse depth; all or none of a run's do."""
    sources = [source for card in _cards(config) for source in card.sources]
    return any(isinstance(source, DenseSource) and "inverse_depth" in source.maps for source in sources)


def picture(
    image: Tensor,
    predictions: Mapping[str, Tensor],
    tasks: Mapping[str, DenseTask],
    classes: Mapping[str, Sequence[str]],
    path: Path,
) -> Path:
    """The image and each task's prediction side by side, at most four in a row; the commonest classes are named by colour.

    image: float (3, h, w) in [0, 1]. predictions: (channels, h, w) each, (channels,) of a class of the image, which is named
    above the image. Returns `path`.
    """
    whole = [_class(value, classes.get(name)) for name, value in predictions.items() if value.ndim == 1]
    told = ", ".join(whole) or f"{image.shape[-1]} x {image.shape[-2]} px"
    panels = [("input", told, (255 * image).round().to(torch.uint8), [])]
    for name, value in predictions.items():
        task = tasks[name]
        if isinstance(task, MapTask):
            panels.append((name, _range(task, value), task.picture(value), _legend(task, value, classes.get(name))))
    columns = min(4, len(panels))
    tall = WIDTH * image.shape[-2] / image.shape[-1]
    bands = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    below = [0.15 + LINE * max(math.ceil(len(keys) / 2) for *_, keys in band) for band in bands]
    figure = new_figure(0.15 + columns * (WIDTH + 0.15), len(bands) * (tall + 0.3) + sum(below))
    top = 0.3
    for band, room in zip(bands, below):
        for column, (name, told, pixels, keys) in enumerate(band):
            left = 0.15 + column * (WIDTH + 0.15)
            write(figure, left, top - 0.08, name, weight="bold")
            write(figure, left + WIDTH, top - 0.08, told, color=MUTED, fontsize=8, ha="right")
            axes = axes_at(figure, left, top, WIDTH, tall)
            axes.imshow(
                pixels.movedim(0, -1).numpy(), interpolation="nearest" if image.shape[-1] < 384 else "antialiased"
            )
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(GRID)
            for number, (text, color) in enumerate(keys):
                row, side = divmod(number, 2)
                x, y = left + side * WIDTH / 2, top + tall + LINE * (row + 0.8)
                write(figure, x, y, "■", color=color, fontsize=9)
                write(figure, x + 0.14, y, short(text, 20), color=INK, fontsize=7.5)
        top += tall + room + 0.3
    return save(figure, path)


def _class(value: Tensor, names: Sequence[str] | None) -> str:
    """The likeliest class of a whole image and its probability."""
    probability, label = value.softmax(0).max(0)
    return f"{short(names[int(label)], 16) if names else f'class {int(label)}'} {100 * float(probability):.0f} %"


def _range(task: DenseTask, value: Tensor) -> str:
    if not isinstance(task, Depth):
        return ""
    near_by, far = task.ends(task.answer(value).float())
    return f"near {float(near_by):.2f} to far {float(far):.2f}"


def _legend(task: DenseTask, value: Tensor, names: Sequence[str] | None) -> list[tuple[str, str]]:
    """(name, colour) of the classes that fill most of a segmentation, the commonest first."""
    if not isinstance(task, Segmentation):
        return []
    counts = torch.bincount(task.answer(value).flatten(), minlength=task.classes)
    shown = [label for label in counts.argsort(descending=True, stable=True).tolist()[:MOST] if counts[label] > 0]
    colors = ["#" + "".join(f"{level:02x}" for level in color) for color in task.palette()]
    return [(names[label] if names else f"class {label}", colors[label]) for label in shown]
