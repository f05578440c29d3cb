"""One label space for several classification tasks, and the classifier and training objective over it (EMTAL, section 2).

    labels of task t: offset_t .. offset_t + k_t - 1, offset_t = k_1 + .. + k_{t-1}, in one head of C = sum k_t outputs
    L = mean over the mixed batch of CE(z_s, y_s), label-smoothed, + L_QR     (class_loss.py for long tails, retain.py)

The "union" head predicts a class among all C (task-agnostic inference): the class of another task is an error. The "separate"
heads are the usual, easier problem (task-aware inference): a softmax over the classes of each task, with the task given at test
time. Separate heads are rows of one matrix, so training does not differ otherwise, and every head is in the graph of every
process. Zhong et al., NeurIPS 2024, arXiv 2501.06884: as in the released code, the loss is a single mean over the batch, in
which a task counts in proportion to its images. A balancer takes one mean for each task (balancing/base.py),
and L_QR is added to the balanced loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, near
from vismt.multitask.balancing.base import Balancer
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.objective import TaskObjective

HEADS = ("union", "separate")


@dataclass(frozen=True)
class Union:
    """The label space of several tasks: their names and numbers of classes, in the order of their labels."""

    tasks: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks, C."""
        return sum(self.counts)

    def offset(self, task: int) -> int:
        """Return the first label of task number `task`."""
        return sum(self.counts[:task])

    def span(self, task: int) -> slice:
        """Return the labels of task number `task`."""
        return slice(self.offset(task), self.offset(task) + self.counts[task])

    def task_of_class(self) -> Tensor:
        """Return the task number of every label, int64 (C,)."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))


class TaskClassifier(nn.Module):
    """A classifier over the union for the images of one task: (b, 3, h, w) -> logits (b, C).

    Args:
        net: images -> logits (b, C).
        union: the label space.
        task: number of the task.
        task_aware: whether the labels of other tasks are excluded, as with separate heads. Their logits become large negative
            finite numbers and not -inf, because an attack that subtracts logits would turn -inf into NaN.
    """

    def __init__(self, net: nn.Module, union: Union, task: int, task_aware: bool) -> None:
        super().__init__()
        self.net, self.span, self.task_aware = net, union.span(task), task_aware

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        if not self.task_aware:
            return logits
        outside = torch.full_like(logits, torch.finfo(logits.dtype).min / 4)
        outside[:, self.span] = logits[:, self.span]
        return outside


class UnionObjective(TaskObjective):
    """Loss over the union: objective({"images" (b, 3, h, w), "labels" int64 (b,)}) -> {"loss", "ce", "accuracy", ...}, scalars.

    Call `step()` after each optimiser step. The result also holds, where they exist, "retain" (L_QR), "running ce/<task>" (of
    retain) and "weight/<task>" (alpha of the balancer). The state of all parts is saved with the training.

    Args:
        net: images -> logits (b, C).
        union: the label space.
        head: "union" or "separate".
        label_smoothing: in [0, 1).
        class_loss: options for long-tailed classes, its counts those of the union; separate heads take each task's part of them.
        balancer: None for the mean over the batch.
        balanced: parameters whose gradients the balancer uses.
        retain: quality retaining, which needs the union head.

    Raises:
        UserError: for an unknown head, a smoothing out of range, and `retain` with separate heads.
    """

    def __init__(
        self,
        net: nn.Module,
        union: Union,
        *,
        head: str = "union",
        label_smoothing: float = 0.0,
        class_loss: ClassLoss | None = None,
        balancer: Balancer | None = None,
        balanced: Sequence[Tensor] = (),
        retain: QualityRetaining | None = None,
    ) -> None:
        super().__init__(net, balancer, balanced, retain)
        if head not in HEADS:
            raise UserError(f"head: '{head}'.{near(head, HEADS)}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: {label_smoothing}; it must be in [0, 1).")
        if retain is not None and head != "union":
            raise UserError(
                "retain: quality retaining compares logits over the classes of all tasks; it needs head: union."
            )
        self.union, self.head, self.label_smoothing = union, head, label_smoothing
        self.class_loss = ClassLoss() if class_loss is None else class_loss
        self.class_loss.check_options("multitask", union.num_classes)
        counts = self.class_loss.class_counts
        self.task_losses = [  # over the classes of each task alone
            self.class_loss if counts is None else replace(self.class_loss, class_counts=counts[union.span(number)])
            for number in range(len(union.tasks))
        ]
        self.register_buffer("task_of_class", union.task_of_class(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        tasks = self.task_of_class[labels]
        logits, entropies, correct = self.outputs(batch["images"], labels, tasks)
        scalars = {"ce": entropies.detach().mean(), "accuracy": correct.float().mean()}
        loss = entropies.mean() if self.balancer is None else self.balance(self._by_task(entropies, tasks), batch)
        if self.retain is not None:
            pull = self.retain.loss(logits, labels)
            loss = loss + pull
            self.remember(logits, labels)
            scalars["retain"] = pull.detach()
            running = zip(self.union.tasks, self.retain.ema)
            scalars |= {f"running ce/{name}": value.clone() for name, value in running}
        return {"loss": loss, **scalars, **self.logged()}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        tasks = self.task_of_class[labels]
        return self._by_task(self.outputs(batch["images"], labels, tasks)[1], tasks)

    def outputs(self, images: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (b, C), the loss of each image (b,), and whether it is classified correctly (b,)."""
        logits = self.net(images).float()
        return logits, *self._per_sample(logits, labels, tasks)

    def _by_task(self, entropies: Tensor, tasks: Tensor) -> dict[str, Tensor]:
        """Return the mean cross-entropy of every task with a sample. entropies, tasks: (b,)."""
        present = {name: entropies[tasks == number] for number, name in enumerate(self.union.tasks)}
        return {name: values.mean() for name, values in present.items() if len(values)}

    def _per_sample(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each sample (b,), and whether it is classified correctly (b,)."""
        if self.head == "union":
            return self.class_loss.entropies(logits, labels, self.label_smoothing), logits.argmax(1) == labels
        entropies, correct = torch.zeros_like(logits[:, 0]), torch.zeros_like(labels, dtype=torch.bool)
        for number in range(len(self.union.tasks)):
            rows, span = tasks == number, self.union.span(number)
            task_logits, truth = logits[rows, span], labels[rows] - span.start
            entropies[rows] = self.task_losses[number].entropies(task_logits, truth, self.label_smoothing)
            correct[rows] = task_logits.argmax(1) == truth
        return entropies, correct
