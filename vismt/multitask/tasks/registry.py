"""Dense tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from vismt.base.errors import UserError, require_known
from vismt.base.registry import Registry
from vismt.multitask.tasks.base import LOSS_OPTIONS, DenseTask
from vismt.multitask.tasks.classification import Classification
from vismt.multitask.tasks.depth import Depth
from vismt.multitask.tasks.edges import Edges
from vismt.multitask.tasks.human_parts import HumanParts
from vismt.multitask.tasks.normals import Normals
from vismt.multitask.tasks.saliency import Saliency
from vismt.multitask.tasks.segmentation import Segmentation

TASKS: Registry[type[DenseTask]] = Registry("task: no dense task")
for _task in (Segmentation, Depth, Normals, Edges, HumanParts, Saliency, Classification):
    TASKS.add(_task.name, _task)


def make_task(spec: str | Mapping[str, Any]) -> DenseTask:
    """Return the task of a specification.

    Args:
        spec: the name of the task, or {"name": ..., option: value, ...} with the options of its class.

    Raises:
        UserError: for an unknown name or option, a missing option, and values out of range.
    """
    if not isinstance(spec, str | Mapping):
        raise UserError(f"task: {spec!r}; give its name, or its options with the name as 'name'.")
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    task = TASKS[name]
    required = task_options(task)
    require_known(f"task: '{name}' has no option", options, required)
    for option, is_required in required.items():
        if is_required and option not in options:
            raise UserError(f"task: '{name}' needs '{option}'.")
    return task(**options)


def loss_options(task: DenseTask) -> list[str]:
    """Return the options of a task that change its loss and not its score."""
    return [name for name in task_options(type(task)) if name in LOSS_OPTIONS]


def task_options(task: type[DenseTask]) -> dict[str, bool]:
    """Return the options of a task by name, and whether they must be given."""
    return {field.name: field.default is MISSING for field in fields(task)}
