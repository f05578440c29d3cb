"""Dense prediction of several tasks from one forward of a shared ViT: the net and its training objective (EMTAL, section 6).

    L = sum over tasks with a valid pixel of  w_t L_t(resized logits, target)  + L_QR           w_t = task.loss_weight

Every task sees every image, and EMTAL's router does not depend on the task. Classification of the whole image may be one of the
tasks; its logits are not resized. A task without a valid pixel or labelled image in the batch is left out (partial labels, for
example when each data set has labels of one task), but its head stays in the graph with a gradient of zero, so that all
processes of DistributedDataParallel use the same parameters. A balancer takes the weighted losses, so "ew" is the plain sum.
In a step of several batches L_t is a mean over the pixels of each of them.
L_QR (retain_dense.py) is computed for semantic segmentation alone, at the resolution of the head, and added to the balanced loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import Sample, blank
from vismt.multitask.balancing.base import Balancer
from vismt.multitask.emtal.retain import DenseRetaining
from vismt.multitask.heads import Head
from vismt.multitask.objective import TaskObjective
from vismt.multitask.tasks import DenseTask

SEGMENTATION = "semseg"


class DenseNet(nn.Module):
    """A ViT with a head for each task: images (b, 3, h, w) in [0, 1] -> {task: logits (b, channels, R, C)}.

    h and w are the backbone's input size, square or not. Tasks of whole images have logits (b, channels), from a PooledHead.

    Args:
        backbone: the ViT.
        heads: heads by task, at least one.
        blocks: numbers of the blocks whose outputs are the taps of the heads, from shallow to deep, one for each width of a
            head; the last must be the model's last block, because later blocks would be trained but never run.

    Raises:
        UserError: without a head, for blocks that do not end with the last, and for heads of other widths.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head], blocks: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.blocks = backbone, check_blocks(blocks, backbone.depth)
        if not heads:
            raise UserError("dense net: no head; give a head for at least one task.")
        for task, head in heads.items():
            if head.widths != (backbone.width,) * len(self.blocks):
                raise UserError(
                    f"dense net: the head of '{task}' takes taps of widths {list(head.widths)}, the net has {len(self.blocks)} "
                    f"of width {backbone.width}."
                )
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps = self.backbone.maps(images, self.blocks)
        return {task: head(taps) for task, head in self.heads.items()}

    @property
    def stock(self) -> nn.Module:
        """The timm model without a classifier."""
        return self.backbone.vit


def default_blocks(depth: int) -> list[int]:
    """Return four evenly spaced blocks that end with the last: 3, 6, 9, 12 of 12, 6, 12, 18, 24 of 24 (TaskPrompter)."""
    return [-(-quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)]


def check_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """Return the blocks counted from 0; raise UserError unless they exist, are sorted and end with the model's last."""
    numbers = [block % depth for block in blocks if -depth <= block < depth]
    if len(numbers) < len(blocks) or not numbers or numbers != sorted(numbers) or numbers[-1] != depth - 1:
        raise UserError(
            f"blocks: {list(blocks)}; name blocks from 0 to {depth - 1}, shallow to deep, that end with {depth - 1}."
        )
    return numbers


class DenseObjective(TaskObjective):
    """Loss of a dense net: objective(batch) -> {"loss", "<task>", ...}, scalars.

    batch is a collated sample (dense_sample.py), which may lack targets. Call `step()` after each optimiser step. The result
    holds "loss"; "<task>", the task's loss without its weight, NaN for a batch without a valid pixel; and, where they exist,
    "retain" (L_QR) and "weight/<task>" (alpha of the balancer). The state of all parts is saved with the training.

    Args:
        net: the net.
        tasks: the tasks of the net's heads, in any order.
        balancer: None for the weighted sum.
        balanced: parameters whose gradients the balancer uses.
        retain: quality retaining of the task semseg.

    Raises:
        UserError: for tasks that are not those of the heads, and `retain` without the task semseg.
    """

    def __init__(
        self,
        net: DenseNet,
        tasks: Sequence[DenseTask],
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
        if retain is not None and SEGMENTATION not in self.tasks:
            raise UserError(f"retain: compares class logits and needs the task {SEGMENTATION}; set retain to null.")

    def forward(self, batch: Sample) -> dict[str, Tensor]:
        logits = self._logits(batch)
        plain = self._task_losses(logits, batch)
        nothing = next(iter(logits.values())).new_zeros(())
        scalars = {name: plain[name].detach() if name in plain else nothing * torch.nan for name in self.tasks}
        losses = self._weighted(plain)
        loss = sum(losses.values(), nothing) if self.balancer is None else self.balance(losses, batch)
        for name in self.tasks.keys() - plain.keys():
            # The sum of no elements: zero whatever the logits are, and in the graph of the head.
            loss = loss + logits[name].flatten()[:0].sum()
        if self.retain is not None:
            pull = self._retain(logits[SEGMENTATION], batch)
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

    def _retain(self, logits: Tensor, batch: Sample) -> Tensor:
        """Return L_QR, 0 without a valid pixel; every process must call it, also without a labelled image."""
        target = batch.get(SEGMENTATION)
        if target is None:
            height, width = batch["image"].shape[-2:]
            target = blank(SEGMENTATION, height, width).to(logits.device).expand(len(logits), -1, -1)
        pull = self.retain.loss(logits, target)
        self.remember(logits, target)
        return pull
