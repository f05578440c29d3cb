"""Tasks of dense runs: loss, metric, pictures. Importing this package does not import torchmetrics."""

from vismt.multitask.tasks.base import (
    IGNORE,
    NYUD_WEIGHTS,
    PASCAL_WEIGHTS,
    TASKS,
    DenseTask,
    MapTask,
    Task,
    loss_options,
    make_task,
    task_options,
)

__all__ = [
    "IGNORE",
    "NYUD_WEIGHTS",
    "PASCAL_WEIGHTS",
    "TASKS",
    "DenseTask",
    "MapTask",
    "Task",
    "loss_options",
    "make_task",
    "task_options",
]
