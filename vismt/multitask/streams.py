"""Features of each task beside the shared features, for models whose method gives tasks parts of their own (mtlora/).

One forward pass computes the shared features once. Features of tasks leave the model sideways, through this context, because
the stock model's forward functions have no place for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.lowrank.layers.gates import PerSample


class task_features(PerSample):
    """Compute features of tasks inside the block: `with task_features(tasks) as features:`.

    Args:
        tasks: Names of tasks. Every sample gets features of each task. With `per_sample` there is one name for each sample of
            the batch. The model then returns what it computes for the task of each sample, so that a batch may mix tasks.
        per_sample: Whether `tasks` has one name for each sample.

    Attributes:
        own: Outputs for the tasks of each module that has features of tasks, (t b) rows, task by task, with gradients. The
            caller takes them out.

    Raises:
        UserError: If the tasks are not a list of names, or, in the forward pass, the model does not have a task or the batch
            has another number of samples.
    """

    def __init__(self, tasks: Sequence[str], *, per_sample: bool = False) -> None:
        texts = not isinstance(tasks, str) and all(isinstance(task, str) for task in tasks)
        if not texts or not tasks or not (per_sample or len(set(tasks)) == len(tasks)):
            rule = "one name for each sample" if per_sample else "different names"
            raise UserError(f"task_features: tasks {shown_value(tasks)}; give a list of {rule}.")
        super().__init__()
        self.tasks, self.per_sample = tuple(tasks), per_sample
        self.streams = 1 if per_sample else len(tasks)  # number of rows for tasks of each sample
        self.own: dict[nn.Module, Tensor] = {}

    def check(self, known: Sequence[str], batch: int) -> None:
        """Raise UserError for a task that is not `known`, and for a batch that the names do not fit."""
        require_known("task_features: the model has no pairs of the task", dict.fromkeys(self.tasks), known)
        if self.per_sample and batch != len(self.tasks):
            raise UserError(
                f"task_features: {len(self.tasks)} names for a batch of {batch} samples; give one for each sample, in its order."
            )
