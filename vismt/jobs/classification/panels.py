"""Write the files from which the pictures of a multi-task run are drawn: examples with answers, and maps of routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.report.panels import spread, to_bytes, write_panel
from vismt.report.routers import ROUTED_IMAGES, ROUTERS, has_routers, write_routers
from vismt.storage.lines import read_lines

if TYPE_CHECKING:
    from vismt.jobs.classification.job import ClassificationJob

EXAMPLES = "examples.npz"
PER_TASK = 6


def write_examples(
    path: Path, images: np.ndarray, truth: Sequence[str], tasks: Sequence[str], predictions: Mapping[str, Sequence[str]]
) -> Path:
    """Write images, the names of their classes and each arm's answers; return `path`.

    Args:
        path: the file to write.
        images: uint8 (n, 3, h, w).
        truth: n names of classes, "task/class".
        tasks: n names of tasks.
        predictions: n names of classes by arm.

    Raises:
        UserError: arms with different numbers of answers.
    """
    arrays = {
        "images": images,
        "truth": np.array(list(truth), dtype=str),
        "tasks": np.array(list(tasks), dtype=str),
        "arms": np.array(list(predictions), dtype=str),
    }
    lengths = {arm: len(answers) for arm, answers in predictions.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"examples: {lengths} answers; give every arm the same number.")
    answers = np.array([list(names) for names in predictions.values()], dtype=str)
    return write_panel(path, "examples", {**arrays, "predictions": answers})


def write(job: ClassificationJob) -> None:
    """Write the files from which the pictures of a run are drawn."""
    examples(job, job.folder / EXAMPLES)
    for arm in job.study.arms:
        routers(job, arm, job.folder / ROUTERS / f"{arm}.npz")


def examples(job: ClassificationJob, path: Path, count: int = PER_TASK) -> Path:
    """Write `count` evaluated images of each task, evenly over its images, with the answers of each arm's first seed.

    The answers are read from the records; nothing is evaluated. Raises UserError for an image without a record of an arm.
    """
    data = job.data
    split = job.split
    names = data.label_names
    first = [job.study.trainings(arm)[0] for arm in job.study.arms]
    images: list[Tensor] = []
    truth: list[str] = []
    tasks: list[str] = []
    answers: dict[str, list[str]] = {training.arm: [] for training in first}
    for number, task in enumerate(data.union.tasks):
        part = data.part(number, split)
        index = spread(len(part), count)
        images.append(part[index])
        truth += [names[label] for label in part.labels[index].tolist()]
        tasks += [task] * len(index)
        ids = [part.ids[i] for i in index.tolist()]
        for training in first:
            answers[training.arm] += _answers(job.folder, training, f"{split}-{task}", ids, names)
    return write_examples(path, to_bytes(torch.cat(images)), truth, tasks, answers)


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


def routers(job: ClassificationJob, arm: str, path: Path) -> Path | None:
    """Write the router maps of an arm's first seed on four images, evenly over the tasks; None for a net without routers."""
    net = job.loaded(job.study.trainings(arm)[0])
    if not has_routers(net):
        return None
    tasks = len(job.data.union.tasks)
    wanted = (torch.arange(ROUTED_IMAGES) * tasks // ROUTED_IMAGES).tolist()
    images = []
    for task in sorted(set(wanted)):
        part = job.data.part(task, job.split)
        images.append(part[spread(len(part), wanted.count(task))])
    return write_routers(path, net, torch.cat(images))
