"""Training objectives of several tasks on one net: the losses of a batch by task, their balance, and quality retaining.

Classes of whole images (EMTAL, section 2):

    L = mean over the labelled images s of the batch of  w_t CE(z_s, y_s), label-smoothed, + L_QR   (class_loss.py, retain.py)

As in the released code (Zhong et al., NeurIPS 2024, arXiv 2501.06884), the loss is a single mean over the batch, in which a
task counts in proportion to its images. A balancer takes one mean for each task (balancing/base.py), and L_QR is added to the
balanced loss. With a Bayesian last layer the loss is VBLL's bound, with smoothed labels (vismt/uncertainty/vbll.py):

    -bound = -sum_c t_c m_c + logsumexp_c(m_c + v_c / 2) = CE(m + v / 2, t) + sum_c t_c v_c / 2
    loss   = mean_b -bound + (KL - log prior of the noise) / N            t: labels, smoothed; N training images of all tasks

m and v are mean and variance of the logits of an image. E log softmax_c(z) >= m_c - logsumexp(m + v / 2) holds for each class,
so it holds for the average that smoothed labels take. Every image of a batch carries the whole second term, so that a balancer
gets it in the loss of each task.

Maps (EMTAL, section 6) are further terms of the same sum:

    L = ... + sum over tasks with a valid pixel of  w_t L_t(resized logits, target)  + L_QR         w_t = task.loss_weight

Every task sees every image, and EMTAL's router does not depend on the task. A task without a valid pixel or labelled image in
the batch is left out (partial labels, for example when each data set has labels of one task), but its head stays in the graph
with a gradient of zero, so that all processes of DistributedDataParallel use the same parameters. A balancer takes the weighted
losses, so "ew" is the plain sum. In a step of several batches L_t is a mean over the pixels of each of them. L_QR of maps is
computed for semantic segmentation alone, at the resolution of the head. Both L_QR are added to the balanced loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import NO_CLASS, Sample, blank, class_key
from vismt.multitask.balancing.base import Balancer
from vismt.multitask.balancing.gradients import GradientBalancer
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.nets import Union
from vismt.multitask.tasks import Task
from vismt.uncertainty.vbll import VBLLClassifier

WHOLE_IMAGES = "images"  # name of what is of tasks of whole images


class MultitaskObjective(nn.Module):
    """Loss of a net of several tasks: objective(batch) -> {"loss", ...}, scalars. Call `step()` after each optimiser step.

    A batch is {"images" (b, 3, h, w), "labels" int64 (b,) of the label space} for a net with logits (b, C), or a collated sample
    (dense_sample.py), which may lack targets, for a net with {task: logits}. The result holds "ce" and "accuracy" of whole
    images, and for each task of maps its loss without its weight, NaN for a batch without a valid pixel. If they exist, it also
    holds "retain" (L_QR), "running ce/<task>" (of retaining of whole images) and "weight/<task>" (alpha of the balancer).

    net, balancer and retain are submodules, so that their state is saved with the training.

    Args:
        net: Trained net.
        tasks: Tasks of maps.
        union: Label space of the tasks of whole images. None without such tasks.
        head: "union" or "separate".
        label_smoothing: Share of the label that is spread over all classes, in [0, 1).
        class_loss: Options for long-tailed classes, with the counts of the union. Separate heads take the part of each task.
        weights: Factor of the loss of each task of whole images. None for 1.
        balancer: Balancer that weighs the losses of the tasks. None for their sum.
        balanced: Parameters whose gradients the balancer uses.
        retain: Quality retaining of whole images, which needs the union head, by the name WHOLE_IMAGES, and of the task semseg,
            by its name.

    Raises:
        UserError: If the tasks are not the tasks of the heads.
    """

    net: Any  # what is called of it differs by objective
    task_of_class: Tensor

    def __init__(
        self,
        net: nn.Module,
        tasks: Sequence[Task] = (),
        union: Union | None = None,
        *,
        head: str = "union",
        label_smoothing: float = 0.0,
        class_loss: ClassLoss | None = None,
        weights: Sequence[float] | None = None,
        balancer: Balancer | None = None,
        balanced: Sequence[Tensor] = (),
        retain: Mapping[str, QualityRetaining] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.balancer, self.retain = net, balancer, nn.ModuleDict(retain or {})
        self.tasks = {task.name: task for task in tasks}
        self.union = Union((), ()) if union is None else union
        names = [*self.tasks, *self.union.tasks]
        heads = getattr(net, "heads", None)
        if isinstance(heads, nn.ModuleDict) and (len(names) > len({*names}) or {*names} != {*heads}):
            raise UserError(f"objective: tasks {names}, heads {list(heads)}; they must be the same.")
        self.head, self.label_smoothing = head, label_smoothing
        self.class_loss = ClassLoss() if class_loss is None else class_loss
        counts = self.class_loss.class_counts
        self.task_losses = [  # over the classes of each task alone
            self.class_loss
            if counts is None
            else replace(self.class_loss, class_counts=counts[self.union.span(number)])
            for number in range(len(self.union.tasks))
        ]
        self.weights = {name: task.loss_weight for name, task in self.tasks.items()}
        self.weights |= dict(zip(self.union.tasks, weights or [1.0] * len(self.union.tasks)))
        self.register_buffer("task_of_class", self.union.task_of_class(), persistent=False)
        self._balanced = tuple(balanced)
        self._batches: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._last: dict[str, Tensor] | None = None  # the latest batch, if the balancer updates after the step
        self._precision: AbstractContextManager = nullcontext()

    @property
    def clipped(self) -> Sequence[Tensor] | None:
        """Parameters whose gradient alone is clipped. None for all.

        A balancer of gradients scales the gradients of the heads and of the balanced parameters by different factors (Nash-MTL
        scales heads by thousands). One norm over both would stop the balanced parameters.
        """
        return self._balanced if isinstance(self.balancer, GradientBalancer) else None

    def forward(self, batch: Sample) -> dict[str, Tensor]:
        outputs, labels = self._outputs(batch)
        nothing = next(iter(outputs.values())).new_zeros(())
        losses = self._map_losses(outputs, batch)
        loss, scalars = sum(self._weighted(losses).values(), nothing), {}
        if self.union.tasks:
            tasks = self.task_of_class[labels]
            outputs[WHOLE_IMAGES], entropies, correct = self.entropies(outputs[WHOLE_IMAGES], labels, tasks)
            losses |= self._by_task(entropies, tasks)
            scalars = {"ce": entropies.detach().mean(), "accuracy": correct.float().mean()}
            if len(labels):
                weights = [self.weights[name] for name in self.union.tasks]
                factors = torch.tensor(weights, dtype=entropies.dtype, device=entropies.device)
                loss = loss + (entropies * factors[tasks]).mean()
        if self.balancer is not None:
            loss = self._balance(self._weighted(losses), batch)
            scalars |= {f"weight/{name}": value for name, value in self.balancer.last_alpha().items()}
        if "labels" not in batch:
            scalars |= {name: losses[name].detach() if name in losses else nothing * torch.nan for name in self.weights}
        for name, logits in outputs.items():
            if name not in losses and not (name == WHOLE_IMAGES and len(labels)):
                # The sum of no elements is zero for any logits, and in the graph of the head.
                loss = loss + logits.flatten()[:0].sum()
        if self.retain:
            pull = self._pull(outputs, labels, batch)
            loss, scalars = loss + pull, {**scalars, "retain": pull.detach()}
        if WHOLE_IMAGES in self.retain:
            running = zip(self.union.tasks, cast(QualityRetaining, self.retain[WHOLE_IMAGES]).ema)
            scalars |= {f"running ce/{name}": value.clone() for name, value in running}
        return {"loss": loss, **scalars}

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Return the losses by task that the balancer weighs."""
        outputs, labels = self._outputs(batch)
        losses = self._map_losses(outputs, batch)
        if self.union.tasks:
            tasks = self.task_of_class[labels]
            losses |= self._by_task(self.entropies(outputs[WHOLE_IMAGES], labels, tasks)[1], tasks)
        return self._weighted(losses)

    def step(self) -> None:
        """Update retaining with the logits of all batches of an optimiser step, and FAMO. Call it after the step."""
        for name, batches in self._batches.items():
            logits, labels = (torch.cat(parts) for parts in zip(*batches))
            cast(QualityRetaining, self.retain[name]).update(logits, labels)
        self._batches.clear()
        if self.balancer is not None and self._last is not None:
            with torch.no_grad(), self._precision:
                self.balancer.update(self.losses(self._last))
            self._last = None

    def classes(self, images: Tensor) -> Tensor:
        """Return the logits (b, C) of whole images."""
        return self.net(images).float()

    def entropies(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (b, C), the loss of each image (b,), and whether it is classified correctly (b,)."""
        if self.head == "union":
            return logits, self.class_loss.entropies(logits, labels, self.label_smoothing), logits.argmax(1) == labels
        entropies, correct = torch.zeros_like(logits[:, 0]), torch.zeros_like(labels, dtype=torch.bool)
        for number in range(len(self.union.tasks)):
            rows, span = tasks == number, self.union.span(number)
            task_logits, truth = logits[rows, span], labels[rows] - span.start
            entropies[rows] = self.task_losses[number].entropies(task_logits, truth, self.label_smoothing)
            correct[rows] = task_logits.argmax(1) == truth
        return logits, entropies, correct

    def _outputs(self, batch: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits by task of maps, and of labelled whole images by the name WHOLE_IMAGES, with their labels (b,)."""
        if "labels" in batch:
            return {WHOLE_IMAGES: self.classes(batch["images"])}, batch["labels"]
        outputs = {name: value.float() for name, value in self.net(batch["image"]).items()}
        labels = torch.full((len(batch["image"]),), NO_CLASS, device=batch["image"].device)
        for number, name in enumerate(self.union.tasks):
            target = batch.get(class_key(name), labels.new_full(labels.shape, NO_CLASS))
            labels = torch.where(target == NO_CLASS, labels, target + self.union.offset(number))
        if self.union.tasks:
            heads = [outputs.pop(name) for name in self.union.tasks]
            logits = heads[0] if self.head == "union" else torch.cat(heads, 1)
            outputs[WHOLE_IMAGES] = logits[labels != NO_CLASS]
        return outputs, labels[labels != NO_CLASS]

    def _map_losses(self, logits: Mapping[str, Tensor], batch: Sample) -> dict[str, Tensor]:
        """Return the losses without their weights of the tasks of maps that have a valid pixel in the batch."""
        losses = {}
        for name, task in self.tasks.items():
            target = batch.get(task.key)
            loss = None if target is None else task.loss(task.resized(logits[name], target.shape[-2:]), target)
            if loss is not None:
                losses[name] = loss
        return losses

    def _weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _by_task(self, entropies: Tensor, tasks: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of every task of whole images with a sample.

        entropies, tasks: Values (b,) of the samples.
        """
        present = {name: entropies[tasks == number] for number, name in enumerate(self.union.tasks)}
        return {name: values.mean() for name, values in present.items() if len(values)}

    def _pull(self, outputs: Mapping[str, Tensor], labels: Tensor, batch: Sample) -> Tensor:
        """Return L_QR, and store the logits and labels, which the next `step` adds to the banks."""
        pulls = []
        for name, retain in self.retain.items():
            logits, targets = outputs[name], labels if name == WHOLE_IMAGES else batch.get(name)
            if targets is None:
                targets = blank(name, *batch["image"].shape[-2:]).to(logits.device).expand(len(logits), -1, -1)
            # Every process asks for it, also without a label.
            pulls.append(cast(QualityRetaining, retain).loss(logits, targets))
            self._batches.setdefault(name, []).append((logits.detach(), targets))
        return sum(pulls[1:], pulls[0])

    def _balance(self, losses: Mapping[str, Tensor], batch: Sample) -> Tensor:
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
        needed = len(self.retain) > 0 or len(losses) < len(balancer.tasks)
        return balancer.combine(losses, self._balanced, retain_graph=needed)


class VariationalObjective(MultitaskObjective):
    """`MultitaskObjective` for a net with `features(images)` and a VBLLClassifier `head`. "ce" is the whole loss.

    Separate heads and losses of unequal classes have no bound.
    """

    def classes(self, images: Tensor) -> Tensor:
        """Return mean and variance of the logits, (2, b, C)."""
        return torch.stack(self.net.head.logit_distribution(self.net.features(images)))

    def entropies(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = cast(VBLLClassifier, self.net.head)
        mean, variance = logits
        share = self.label_smoothing
        noise = (1 - share) * variance.gather(1, labels[:, None]).squeeze(1) + share * variance.mean(1)
        penalty = (head.kl() - head.noise_log_prior()) / head.num_train
        losses = self.class_loss.entropies(mean + variance / 2, labels, share) + noise / 2 + penalty
        return mean, losses, mean.argmax(1) == labels
