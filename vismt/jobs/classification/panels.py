"""What the pictures of a multi-task run are drawn from: examples with every arm's answer, and what routers weigh where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from vismt.engine.arms import Unit, arm_names, final_units
from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.jobs.classification.evaluation import Evaluation
from vismt.jobs.classification.models import loaded
from vismt.report.panels import spread, to_bytes, write_panel
from vismt.report.routers import ROUTED_IMAGES, routed, write_routers

EXAMPLES, PER_TASK = "examples.npz", 6


def write_examples(
    path: Path, images: np.ndarray, truth: Sequence[str], tasks: Sequence[str], predictions: Mapping[str, Sequence[str]]
) -> Path:
    """Write images, the name of their class and what each arm says; returns `path`.

    images: uint8 (n, 3, h, w). truth, tasks: n names each, a class's as "task/class". predictions: by arm, n names.
    Raises UserError for numbers of things that do not fit together.
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
    answers = np.array([list(own) for own in predictions.values()], dtype=str)
    return write_panel(path, "examples", {**arrays, "predictions": answers})


def examples(evaluation: Evaluation, path: Path, count: int = PER_TASK) -> Path:
    """`count` evaluated images of each task, evenly over its images, with what the first seed of each arm says of them.

    The answers are those on record, nothing is evaluated. Raises UserError for an image that an arm has no record of.
    """
    config, data = evaluation.config, evaluation.data
    names = data.label_names
    first = [final_units(config, evaluation.folder, arm)[0] for arm in arm_names(config)]
    images, truth, tasks = [], [], []
    answers: dict[str, list[str]] = {unit.arm: [] for unit in first}
    for number, task in enumerate(data.union.tasks):
        part = data.part(number, config.evaluate.split)
        index = spread(len(part), count)
        images.append(part[index])
        truth += [names[label] for label in part.labels[index].tolist()]
        tasks += [task] * len(index)
        for unit in first:
            ids = [part.ids[i] for i in index.tolist()]
            answers[unit.arm] += _answers(evaluation.folder, unit, f"{config.evaluate.split}-{task}", ids, names)
    return write_examples(path, to_bytes(torch.cat(images)), truth, tasks, answers)


def _answers(folder: Path, unit: Unit, stem: str, ids: Sequence[str], names: Sequence[str]) -> list[str]:
    path = unit.folder / "records" / f"{stem}.jsonl"
    found = {row["id"]: row.get("clean") for row in read_lines(path) if "id" in row}
    lacking = next(
        (name for name in ids if not isinstance(found.get(name), int) or not 0 <= found[name] < len(names)), None
    )
    if lacking is not None:
        raise UserError(
            f"examples: '{path}' says nothing of image '{lacking}'; `vismt evaluate {folder}` completes it."
        )
    return [names[found[name]] for name in ids]


def routers(evaluation: Evaluation, arm: str, path: Path) -> Path | None:
    """`write_routers` of an arm's first seed on four evaluated images, evenly over the tasks; None where nothing routes."""
    config, data = evaluation.config, evaluation.data
    unit = routed(config, evaluation.folder, arm)
    if unit is None:
        return None
    wanted = (torch.arange(ROUTED_IMAGES) * len(data.union.tasks) // ROUTED_IMAGES).tolist()
    images = []
    for task in sorted(set(wanted)):
        part = data.part(task, config.evaluate.split)
        images.append(part[spread(len(part), wanted.count(task))])
    return write_routers(path, loaded(config, unit, data.union.num_classes), torch.cat(images))
