"""What the prediction panels of a dense run are drawn from: a few evaluated images, their truth, every arm's pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, stack

from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import collate
from vismt.jobs.dense.config import PANELS
from vismt.jobs.dense.evaluation import metric_name
from vismt.jobs.dense.models import fingerprint, loaded
from vismt.jobs.dense.pooled_score import Scored
from vismt.multitask.tasks import MapTask
from vismt.multitask.tasks.base import DARK
from vismt.report.panels import read_panel, spread, to_bytes, write_panel
from vismt.report.routers import ROUTED_IMAGES, ROUTERS, has_routers, write_routers

if TYPE_CHECKING:
    from vismt.jobs.dense.job import DenseJob

SHOWN = 4


def write(job: DenseJob) -> None:
    """Write what the pictures of a run's images are drawn from."""
    write_predictions(job)
    rows, size = job.data.part(job.split), (job.config.size[0], job.config.size[1])
    for arm in job.study.arms:
        training = job.study.trainings(arm)[0]
        net = loaded(job.study.config_of(training), training, size)
        if has_routers(net):
            images = [rows.fitted(i, size)["image"] for i in spread(len(rows), ROUTED_IMAGES).tolist()]
            write_routers(job.folder / ROUTERS / f"{arm}.npz", net, stack(images))


def write_predictions(job: DenseJob, count: int = SHOWN) -> Path | None:
    """Write dense_panels.npz of the run folder: `count` evaluated images, evenly over their split, not chosen by result.

    Only tasks with a value at every pixel are drawn; without such a task return None and write no file. A file of the same
    images and trainings is kept, and nothing is predicted. The arrays:

        truth (t, n, 3, h, w), predictions (a, t, n, 3, h, w): pictures by MapTask.picture, a prediction in the colours of its
            truth, of the first seed of each arm, merged.
        scores (a, t, n): score of the image alone, NaN for none.
        trained (a, t): whether the arm has the task; without it the pictures are dark grey and the scores NaN.
        trainings (a,): digests of the trainings.
    """
    tasks = [task for task in job.data.tasks.values() if isinstance(task, MapTask)]
    if not tasks:
        return None
    rows = job.data.part(job.split)
    numbers = spread(len(rows), count).tolist()
    first = [job.study.trainings(arm)[0] for arm in job.study.arms]
    about = {
        "ids": np.array([rows.ids[i] for i in numbers], dtype=str),
        "arms": np.array([training.arm for training in first], dtype=str),
        "trainings": np.array([fingerprint(training) for training in first], dtype=str),
    }
    path = job.folder / PANELS
    if _known(path, about):
        return path
    sample = collate([rows.fitted(i, job.data.size) for i in numbers])
    predictions, trained, scores = [], [], []
    for training in first:
        logits = job.evaluation.logits(job.final(training), sample)
        scored = job.scored(training, job.split)
        trained.append([task.name in logits for task in tasks])
        predictions.append(
            np.stack([_pictures(task, logits.get(task.name), sample["image"], sample.get(task.key)) for task in tasks])
        )
        scores.append([[_alone(scored.get(task.name), rows.ids[i]) for i in numbers] for task in tasks])
    return write_panel(
        path,
        "maps",
        {
            **about,
            "images": to_bytes(sample["image"]),
            "tasks": np.array([task.name for task in tasks], dtype=str),
            "metrics": np.array([metric_name(task) for task in tasks], dtype=str),
            "shares": np.array([task.share for task in tasks]),
            "lower_is_better": np.array([task.lower_is_better for task in tasks]),
            "truth": np.stack([_pictures(task, sample.get(task.key), sample["image"]) for task in tasks]),
            "trained": np.array(trained),
            "predictions": np.stack(predictions),
            "scores": np.array(scores, dtype=np.float64),
        },
    )


def _alone(scored: Scored | None, name: str) -> float:
    """Return the score of an image alone, NaN for none."""
    score = None if scored is None else scored.alone.get(name)
    return math.nan if score is None else score


def _known(path: Path, about: dict[str, np.ndarray]) -> bool:
    """Return whether the file is there, sound, and of these images, arms and trainings."""
    try:
        arrays = read_panel(path, "maps")
    except UserError:
        return False
    return all(arrays[name].tolist() == expected.tolist() for name, expected in about.items())


def _pictures(task: MapTask, maps: Tensor | None, images: Tensor, like: Tensor | None = None) -> np.ndarray:
    """Return pictures uint8 (n, 3, h, w) of a batch of maps; without maps all pixels have no value."""
    if maps is None:
        return np.full(tuple(images.shape), DARK, dtype=np.uint8)
    references = [None] * len(maps) if like is None else like
    return np.stack([task.picture(map, reference).numpy() for map, reference in zip(maps, references, strict=True)])
