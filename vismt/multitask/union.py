"""One label space for several classification tasks, and the classifier and training objective over it (EMTAL, section 2).

    labels of task t: offset_t .. offset_t + k_t - 1, offset_t = k_1 + .. + k_{t-1}, in one head of C = sum k_t outputs
    L = mean over the mixed batch of CE(z_s, y_s), label-smoothed, + L_QR                    (retain.py)

The union head is asked for the class among all C, and no task is told at test: the answer of another task is wrong. The
"separate" head is the usual easier problem, a softmax over each task's own slice and the task told at test; as the rows of
one matrix they train the same, and every head is in the graph of every process. Zhong et al., NeurIPS 2024, arXiv
2501.06884: the released code's single mean over the batch, with which a task weighs as it has images. With a balancer the
losses are one mean for each task (balancing.py), and L_QR is added to what it makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.multitask.balancing import Balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.objective import TaskObjective
from vismt.multitask.retain import QualityRetaining

HEADS = ("union", "separate")


@dataclass(frozen=True)
class Union:
    """Tasks by name with their numbers of classes, in the order of their labels."""

    tasks: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        """C, of all tasks."""
        return sum(self.counts)

    def offset(self, task: int) -> int:
        """The first label of task number `task`."""
        return sum(self.counts[:task])

    def span(self, task: int) -> slice:
        """The labels of task number `task`."""
        return slice(self.offset(task), self.offset(task) + self.counts[task])

    def task_of_class(self) -> Tensor:
        """int64 (C,): the task of every label."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))


class TaskClassifier(nn.Module):
    """What a classifier over the union says of one task's images: (b, 3, h, w) -> (b, C).

    told: the task is told, so that labels of the others can never win (the separate heads' way). They get the lowest finite
    numbers and not -inf, of which an attack that takes differences of logits would make NaN.
    """

    def __init__(self, net: nn.Module, union: Union, task: int, told: bool) -> None:
        super().__init__()
        self.net, self.span, self.told = net, union.span(task), told

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        if not self.told:
            return logits
        outside = torch.full_like(logits, torch.finfo(logits.dtype).min / 4)
        outside[:, self.span] = logits[:, self.span]
        return outside


class UnionObjective(TaskObjective):
    """objective({"images" (b, 3, h, w), "labels" int64 (b,)}) -> {"loss", "ce", "accuracy", ...}, scalars.

    `step()` follows each optimiser step. net: images -> logits (b, C). head: "union" or "separate". label_smoothing: in
    [0, 1). balancer: None for the mean over the batch. balanced: the parameters whose gradients a balancer sees. retain:
    needs the union head. fade: the schedule that the net's routers follow. All of them are children: their state is saved
    with the training.
    Logged besides: "retain" (L_QR), "fade" (a), "weight/<task>" (a balancer's alpha), "running ce/<task>" (of retain).
    Raises UserError for an unknown head, a smoothing out of range, and retain with separate heads.
    """

    def __init__(
        self,
        net: nn.Module,
        union: Union,
        *,
        head: str = "union",
        label_smoothing: float = 0.0,
        balancer: Balancer | None = None,
        balanced: Sequence[Tensor] = (),
        retain: QualityRetaining | None = None,
        fade: RouterFade | None = None,
    ) -> None:
        super().__init__(net, balancer, balanced, retain, fade)
        if head not in HEADS:
            raise UserError(f"head: '{head}'.{near(head, HEADS)}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: {label_smoothing}; it lies in [0, 1).")
        if retain is not None and head != "union":
            raise UserError(
                "retain: quality retaining compares logits over the classes of all tasks; it needs head: union."
            )
        self.union, self.head, self.label_smoothing = union, head, label_smoothing
        self.register_buffer("task_of_class", union.task_of_class(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self.net(batch["images"]).float(), batch["labels"]
        tasks = self.task_of_class[labels]
        each, right = self._each(logits, labels, tasks)
        found = {"ce": each.detach().mean(), "accuracy": right.float().mean()}
        if self.balancer is None:
            loss = each.mean()
        else:
            present = {name: each[tasks == number] for number, name in enumerate(self.union.tasks)}
            losses = {name: values.mean() for name, values in present.items() if len(values)}
            loss = self.balance(losses)
        if self.retain is not None:
            pull = self.retain.loss(logits, labels)
            loss = loss + pull
            self.remember(logits, labels)
            found["retain"] = pull.detach()
            found |= {f"running ce/{name}": value.clone() for name, value in zip(self.union.tasks, self.retain.ema)}
        return {"loss": loss, **found, **self.logged()}

    def _each(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each sample (b,), and whether it is right (b,)."""
        if self.head == "union":
            each = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
            return each, logits.argmax(1) == labels
        each, right = torch.zeros_like(logits[:, 0]), torch.zeros_like(labels, dtype=torch.bool)
        for number in range(len(self.union.tasks)):
            here, span = tasks == number, self.union.span(number)
            own, truth = logits[here, span], labels[here] - span.start
            each[here] = F.cross_entropy(own, truth, label_smoothing=self.label_smoothing, reduction="none")
            right[here] = own.argmax(1) == truth
        return each, right
