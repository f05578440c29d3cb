"""Training objectives of several tasks on one net: the losses of a batch by task, their balance, and quality retaining.

Classification over one label space (EMTAL, section 2):

    L = mean over the mixed batch of CE(z_s, y_s), label-smoothed, + L_QR     (class_loss.py for long tails, retain.py)

As in the released code (Zhong et al., NeurIPS 2024, arXiv 2501.06884), the loss is a single mean over the batch, in which a
task counts in proportion to its images. A balancer takes one mean for each task (balancing/base.py), and L_QR is added to the
balanced loss. With a Bayesian last layer the loss is VBLL's bound, with smoothed labels (vismt/uncertainty/vbll.py):

    -bound = -sum_c t_c m_c + logsumexp_c(m_c + v_c / 2) = CE(m + v / 2, t) + sum_c t_c v_c / 2
    loss   = mean_b -bound + (KL - log prior of the noise) / N            t: labels, smoothed; N training images of all tasks

m and v are mean and variance of the logits of an image. E log softmax_c(z) >= m_c - logsumexp(m + v / 2) holds for each class,
so it holds for the average that smoothed labels take. Every image of a batch carries the whole second term, so that a balancer
gets it in the loss of each task.

Dense prediction (EMTAL, section 6):

    L = sum over tasks with a valid pixel of  w_t L_t(resized logits, target)  + L_QR           w_t = task.loss_weight

Every task sees every image, and EMTAL's router does not depend on the task. Classes of whole images may be among the tasks,
each with a softmax of its own or over the union of their classes (tasks/classes.py). Their logits are not resized. A task
without a valid pixel or labelled image in the batch is left out (partial labels, for example when each data set has labels of
one task), but its head stays in the graph with a gradient of zero, so that all processes of DistributedDataParallel use the
same parameters. A balancer takes the weighted losses, so "ew" is the plain sum. In a step of several batches L_t is a mean over
the pixels of each of them. L_QR is computed for semantic segmentation alone, at the resolution of the head, and added to the
balanced loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import Sample, blank
from vismt.multitask.balancing.base import Balancer
from vismt.multitask.balancing.gradients import GradientBalancer
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.emtal.retain import DenseRetaining, QualityRetaining
from vismt.multitask.nets import SEGMENTATION, DenseNet, Union
from vismt.multitask.tasks import Task
from vismt.uncertainty.vbll import VBLLClassifier


class TaskObjective(nn.Module, ABC):
    """Base class of objectives. Call `step()` after each optimiser step.

    net, balancer and retain are submodules, so that their state is saved with the training.

    Args:
        net: Trained net.
        balancer: Balancer that weighs the losses of the tasks.
        balanced: Parameters whose gradients the balancer uses.
        retain: Quality retaining.
    """

    net: Any  # what `outputs` and `losses` call of it differs by objective

    def __init__(
        self, net: nn.Module, balancer: Balancer | None, balanced: Sequence[Tensor], retain: QualityRetaining | None
    ) -> None:
        super().__init__()
        self.net, self.balancer, self.retain = net, balancer, retain
        self._balanced = tuple(balanced)
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._last: Any = None  # the latest batch, if the balancer compares its losses before and after the step
        self._precision: AbstractContextManager = nullcontext()

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses by task that the balancer weighs."""

    @property
    def clipped(self) -> Sequence[Tensor] | None:
        """Parameters whose gradient alone is clipped. None for all.

        A balancer of gradients scales the gradients of the heads and of the balanced parameters by different factors (Nash-MTL
        scales heads by thousands). One norm over both would stop the balanced parameters.
        """
        return self._balanced if isinstance(self.balancer, GradientBalancer) else None

    def balance(self, losses: Mapping[str, Tensor], batch: object) -> Tensor:
        """Return one scalar from the losses by task of a batch. It needs a balancer.

        L_QR, and the head of a task without a loss, still need the graph afterwards.
        """
        balancer = self.balancer
        assert balancer is not None
        if type(balancer).update is not Balancer.update:
            kind = balancer.balanced(self._balanced)[0].device.type
            enabled = torch.is_autocast_enabled(kind)
            self._last = batch
            self._precision = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled)
        needed = self.retain is not None or len(losses) < len(balancer.tasks)
        return balancer.combine(losses, self._balanced, retain_graph=needed)

    def remember(self, logits: Tensor, labels: Tensor) -> None:
        """Store a batch, which the next `step` adds to the bank of `retain`."""
        self._batches.append((logits.detach(), labels))

    def logged(self) -> dict[str, Tensor]:
        """Return "weight/<task>", alpha of the balancer for the last batch."""
        if self.balancer is None:
            return {}
        return {f"weight/{name}": value for name, value in self.balancer.last_alpha().items()}

    def step(self) -> None:
        """Update retaining with the logits of all batches of an optimiser step, and FAMO. Call it after the step."""
        if self.retain is not None and self._batches:
            logits, labels = (torch.cat(parts) for parts in zip(*self._batches))
            self.retain.update(logits, labels)
            self._batches.clear()
        if self.balancer is not None and self._last is not None:
            with torch.no_grad(), self._precision:
                self.balancer.update(self.losses(self._last))
            self._last = None


class UnionObjective(TaskObjective):
    """Loss over the union: objective({"images" (b, 3, h, w), "labels" int64 (b,)}) -> {"loss", "ce", "accuracy", ...}, scalars.

    Call `step()` after each optimiser step. The result also holds, if they exist, "retain" (L_QR), "running ce/<task>" (of
    retain) and "weight/<task>" (alpha of the balancer). The state of all parts is saved with the training.

    Args:
        net: Net from images to logits (b, C).
        union: Label space.
        head: "union" or "separate".
        label_smoothing: Share of the label that is spread over all classes, in [0, 1).
        class_loss: Options for long-tailed classes, with the counts of the union. Separate heads take the part of each task.
        balancer: Balancer. None for the mean over the batch.
        balanced: Parameters whose gradients the balancer uses.
        retain: Quality retaining, which needs the union head.
    """

    task_of_class: Tensor

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
        self.union, self.head, self.label_smoothing = union, head, label_smoothing
        self.class_loss = ClassLoss() if class_loss is None else class_loss
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
        if self.head == "union":
            return logits, self.class_loss.entropies(logits, labels, self.label_smoothing), logits.argmax(1) == labels
        entropies, correct = torch.zeros_like(logits[:, 0]), torch.zeros_like(labels, dtype=torch.bool)
        for number in range(len(self.union.tasks)):
            rows, span = tasks == number, self.union.span(number)
            task_logits, truth = logits[rows, span], labels[rows] - span.start
            entropies[rows] = self.task_losses[number].entropies(task_logits, truth, self.label_smoothing)
            correct[rows] = task_logits.argmax(1) == truth
        return logits, entropies, correct

    def _by_task(self, entropies: Tensor, tasks: Tensor) -> dict[str, Tensor]:
        """Return the mean cross-entropy of every task with a sample.

        entropies, tasks: Values (b,) of the samples.
        """
        present = {name: entropies[tasks == number] for number, name in enumerate(self.union.tasks)}
        return {name: values.mean() for name, values in present.items() if len(values)}


class VariationalUnionObjective(UnionObjective):
    """`UnionObjective` for a net with `features(images)` and a VBLLClassifier `head`. "ce" is the whole loss.

    Separate heads and losses of unequal classes have no bound.
    """

    def outputs(self, images: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = cast(VBLLClassifier, self.net.head)
        mean, variance = head.logit_distribution(self.net.features(images))
        share = self.label_smoothing
        noise = (1 - share) * variance.gather(1, labels[:, None]).squeeze(1) + share * variance.mean(1)
        penalty = (head.kl() - head.noise_log_prior()) / head.num_train
        losses = self.class_loss.entropies(mean + variance / 2, labels, share) + noise / 2 + penalty
        return mean, losses, mean.argmax(1) == labels


class DenseObjective(TaskObjective):
    """Loss of a dense net: objective(batch) -> {"loss", "<task>", ...}, scalars.

    The batch is a collated sample (dense_sample.py), which may lack targets. Call `step()` after each optimiser step. The
    result holds "loss", and for each "<task>" its loss without its weight, NaN for a batch without a valid pixel. If they
    exist, it also holds "retain" (L_QR) and "weight/<task>" (alpha of the balancer). The state of all parts is saved with the
    training.

    Args:
        net: Net.
        tasks: Tasks of the net's heads, in any order.
        balancer: Balancer. None for the weighted sum.
        balanced: Parameters whose gradients the balancer uses.
        retain: Quality retaining of the task semseg.

    Raises:
        UserError: If the tasks are not the tasks of the heads.
    """

    def __init__(
        self,
        net: DenseNet,
        tasks: Sequence[Task],
        balancer: Balancer | None = None,
        balanced: Sequence[Tensor] = (),
        retain: DenseRetaining | None = None,
    ) -> None:
        super().__init__(net, balancer, balanced, retain)
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks) or set(self.tasks) != set(net.heads):
            raise UserError(
                f"dense: tasks {[task.name for task in tasks]}, heads {list(net.heads)}; they must be the same."
            )

    def forward(self, batch: Sample) -> dict[str, Tensor]:
        logits = self._logits(batch)
        plain = self._task_losses(logits, batch)
        nothing = next(iter(logits.values())).new_zeros(())
        scalars = {name: plain[name].detach() if name in plain else nothing * torch.nan for name in self.tasks}
        losses = self._weighted(plain)
        loss = sum(losses.values(), nothing) if self.balancer is None else self.balance(losses, batch)
        for name in self.tasks.keys() - plain.keys():
            # The sum of no elements is zero for any logits, and in the graph of the head.
            loss = loss + logits[name].flatten()[:0].sum()
        if self.retain is not None:
            # Every process asks for it, also without a labelled image. Without a valid pixel it is 0.
            classes, target = logits[SEGMENTATION], batch.get(SEGMENTATION)
            if target is None:
                height, width = batch["image"].shape[-2:]
                target = blank(SEGMENTATION, height, width).to(classes.device).expand(len(classes), -1, -1)
            pull = self.retain.loss(classes, target)
            self.remember(classes, target)
            loss = loss + pull
            scalars["retain"] = pull.detach()
        return {"loss": loss, **scalars, **self.logged()}

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        return self._weighted(self._task_losses(self._logits(batch), batch))

    def _logits(self, batch: Sample) -> dict[str, Tensor]:
        return {name: value.float() for name, value in self.net(batch["image"]).items()}

    def _task_losses(self, logits: Mapping[str, Tensor], batch: Sample) -> dict[str, Tensor]:
        """Return the losses without their weights of the tasks that have a valid pixel in the batch."""
        losses = {}
        for name, task in self.tasks.items():
            target = batch.get(task.key)
            loss = None if target is None else task.loss(task.resized(logits[name], target.shape[-2:]), target)
            if loss is not None:
                losses[name] = loss
        return losses

    def _weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.tasks[name].loss_weight * loss for name, loss in losses.items()}
