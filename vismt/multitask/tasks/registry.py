"""Dense tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from vismt.errors import UserError, require_known
from vismt.multitask.tasks.base import DenseTask
from vismt.multitask.tasks.classification import Classification
from vismt.multitask.tasks.depth import Depth
from vismt.multitask.tasks.edges import Edges
from vismt.multitask.tasks.normals import Normals
from vismt.multitask.tasks.parts import Parts
from vismt.multitask.tasks.saliency import Saliency
from vismt.multitask.tasks.segmentation import Segmentation

TASKS: dict[str, type[DenseTask]] = {
    kind.name: kind for kind in (Segmentation, Depth, Normals, Edges, Parts, Saliency, Classification)
}


def make_task(spec: str | Mapping[str, Any]) -> DenseTask:
    """The task of a specification: its name, or {"name": ..., option: value, ...} with the options of its class.

    Raises UserError for an unknown name or option, an option that is missing, and values out of range.
    """
    if not isinstance(spec, str | Mapping):
        raise UserError(f"task: {spec!r}; give its name, or its options with the name as 'name'.")
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    require_known("task: no dense task", [name], TASKS)
    known = task_options(TASKS[name])
    require_known(f"task: '{name}' has no option", options, known)
    for option, needed in known.items():
        if needed and option not in options:
            raise UserError(f"task: '{name}' needs '{option}'.")
    return TASKS[name](**options)


def task_options(kind: type[DenseTask]) -> dict[str, bool]:
    """Options of a task by name, and whether they must be given."""
    return {field.name: field.default is MISSING for field in fields(kind)}
