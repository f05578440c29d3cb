"""Features of each task beside the shared ones, for models whose method gives tasks parts of their own (mtlora/).

One forward pass computes the shared features once. What a module computes for tasks leaves the model sideways, through this
context: the stock model's forward functions have no place for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.lowrank.layers.gates import PerSample


class task_features(PerSample):
    """Compute features of tasks inside the block: `with task_features(tasks) as features:`.

    Args:
        tasks: names of tasks; every sample gets features of each. With `per_sample` one name for each sample of the batch: the
            model then returns what it computes for the task of each sample, and a batch may mix tasks.
        per_sample: see above.

    Attributes:
        own: of each module that has features of tasks, its output for them, (t b) rows, task by task, with gradients; the
            caller takes it out.

    Raises:
        UserError: for tasks that are not a list of names, and in the forward pass for a task that the model does not have and a
            batch of another number of samples.
    """

    def __init__(self, tasks: Sequence[str], *, per_sample: bool = False) -> None:
        texts = not isinstance(tasks, str) and all(isinstance(task, str) for task in tasks)
        if not texts or not tasks or not (per_sample or len(set(tasks)) == len(tasks)):
            rule = "one name for each sample" if per_sample else "different names"
            raise UserError(f"task_features: tasks {shown_value(tasks)}; give a list of {rule}.")
        super().__init__()
        self.tasks, self.per_sample = tuple(tasks), per_sample
        self.streams = 1 if per_sample else len(tasks)  # rows for tasks of each sample
        self.own: dict[nn.Module, Tensor] = {}

    def check(self, known: Sequence[str], batch: int) -> None:
        """Raise UserError for a task that is not `known`, and for a batch that the names do not fit."""
        require_known("task_features: the model has no pairs of the task", dict.fromkeys(self.tasks), known)
        if self.per_sample and batch != len(self.tasks):
            raise UserError(
                f"task_features: {len(self.tasks)} names for a batch of {batch} samples; give one for each sample, in its order."
            )
