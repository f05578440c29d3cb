"""What the prediction panels of a dense run are drawn from: a few evaluated images, their truth, every arm's pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor, stack

from vismt.engine.arms import arm_names, final_units
from vismt.errors import UserError
from vismt.jobs.dense.config import PANELS
from vismt.jobs.dense.evaluation import Evaluation
from vismt.jobs.dense.models import fingerprint, loaded
from vismt.multitask.tasks import MapTask
from vismt.multitask.tasks.base import DARK
from vismt.report.panels import read_panel, spread, to_bytes, write_panel
from vismt.report.routers import ROUTED_IMAGES, ROUTERS, routed, write_routers

SHOWN = 4


def write_panels(evaluation: Evaluation, count: int = SHOWN) -> Path | None:
    """Write dense_panels.npz of the run folder: `count` evaluated images, evenly over their part, not chosen by result.

    Of the tasks that have a value at every pixel; None, and no file, where there is no such task.

    truth (t, n, 3, h, w), predictions (a, t, n, 3, h, w): pictures by DenseTask.picture, a prediction's in the colours of its
    truth, of the first seed of each arm, merged. scores (a, t, n): of the image alone, NaN for none. trained (a, t): whether
    the arm has the task; without it its pictures are dark grey and its scores NaN. trainings (a,): which files they are of.
    A file of the same images and trainings is left as it is: nothing is predicted.
    """
    config, tasks = evaluation.config, [task for task in evaluation.tasks.values() if isinstance(task, MapTask)]
    if not tasks:
        return None
    rows = evaluation.data.part(config.evaluate.split)
    numbers = spread(len(rows), count).tolist()
    first = [final_units(config, evaluation.folder, arm)[0] for arm in arm_names(config)]
    about = {
        "ids": np.array([rows.ids[i] for i in numbers], dtype=str),
        "arms": np.array([unit.arm for unit in first], dtype=str),
        "trainings": np.array([fingerprint(unit) for unit in first], dtype=str),
    }
    path = evaluation.folder / PANELS
    if _known(path, about):
        return path
    predictions, trained, scores, truth, images = [], [], [], [], np.empty(0)
    for unit in first:
        sample, logits, alone = evaluation.shown(unit, numbers)
        if not truth:
            images = to_bytes(sample["image"])
            truth = [_pictures(task, sample.get(task.key), sample["image"]) for task in tasks]
        trained.append([task.name in logits for task in tasks])
        predictions.append(
            [_pictures(task, logits.get(task.name), sample["image"], sample.get(task.key)) for task in tasks]
        )
        own = [alone.get(task.name, [None] * len(numbers)) for task in tasks]
        scores.append([[math.nan if one is None else one for one in line] for line in own])
    return write_panel(
        path,
        "dense",
        {
            **about,
            "images": images,
            "tasks": np.array([task.name for task in tasks], dtype=str),
            "metrics": np.array([evaluation.metric(task) for task in tasks], dtype=str),
            "lower_is_better": np.array([task.lower_is_better for task in tasks]),
            "truth": np.stack(truth),
            "trained": np.array(trained),
            "predictions": np.stack([np.stack(own) for own in predictions]),
            "scores": np.array(scores, dtype=np.float64),
        },
    )


def write_router_panels(evaluation: Evaluation) -> None:
    """The file of router_maps for every arm with routers: its first seed, not merged, on images evenly over their part."""
    config = evaluation.config
    rows, size = evaluation.data.part(config.evaluate.split), (config.size[0], config.size[1])
    for arm in arm_names(config):
        unit = routed(config, evaluation.folder, arm)
        if unit is not None:
            images = [rows.fitted(i, size)["image"] for i in spread(len(rows), ROUTED_IMAGES).tolist()]
            write_routers(evaluation.folder / ROUTERS / f"{arm}.npz", loaded(config, unit), stack(images))


def _known(path: Path, about: dict[str, np.ndarray]) -> bool:
    """Whether the file is there, sound, and of these images, arms and trainings."""
    try:
        found = read_panel(path, "dense")
    except UserError:
        return False
    return all(found[name].tolist() == wanted.tolist() for name, wanted in about.items())


def _pictures(task: MapTask, maps: Tensor | None, images: Tensor, like: Tensor | None = None) -> np.ndarray:
    """uint8 (n, 3, h, w) of a batch of maps; without maps all of it has no value."""
    if maps is None:
        return np.full(tuple(images.shape), DARK, dtype=np.uint8)
    return np.stack(
        [task.picture(one, None if like is None else like[place]).numpy() for place, one in enumerate(maps)]
    )
