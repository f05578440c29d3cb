"""Dense prediction of several tasks from one forward of a shared ViT: the net and its training objective (EMTAL, section 6).

    L = sum over tasks with a valid pixel of  w_t L_t(resized logits, target)  + L_QR           w_t = task.loss_weight

Every task sees every image, and the router of EMTAL does not know the tasks. One of them may be the class of the image, whose
logits have no size and are taken as they are. A task without a valid pixel or labelled image in the batch is left out (partial
labels, as from sets that have one of the tasks each), but its head stays in the graph with a gradient of zero: all processes of
DistributedDataParallel see the same parameters. With a balancer the weighted losses are its losses, so that "ew" is the plain
sum. L_QR (retain_dense.py) is of semantic segmentation alone, at the resolution of the head, and is added to what the balancer
makes of the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.data.dense_sample import Sample, blank
from vismt.errors import UserError
from vismt.multitask.balancing import Balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.heads import Head
from vismt.multitask.objective import TaskObjective
from vismt.multitask.retain_dense import DenseRetaining
from vismt.multitask.tasks import DenseTask

SEGMENTATION = "semseg"


class DenseNet(nn.Module):
    """Images (b, 3, h, w) in [0, 1], h and w the backbone's, square or not -> {task: logits (b, channels, R, C)}.

    A task of whole images has logits (b, channels), from a PooledHead.

    heads: {task: head}, of one or more tasks. blocks: whose outputs the heads see, from shallow to deep, as many as a head has
    widths; the last of them is the model's last, since what comes after a tap would be trained and never run.
    Raises UserError for no head, blocks that do not end with the last, and heads of other widths.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head], blocks: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.blocks = backbone, check_blocks(blocks, backbone.depth)
        if not heads:
            raise UserError("dense net: no head; name a task.")
        for task, head in heads.items():
            if head.widths != (backbone.width,) * len(self.blocks):
                raise UserError(
                    f"dense net: the head of '{task}' takes taps of widths {list(head.widths)}, here are {len(self.blocks)} of "
                    f"{backbone.width}."
                )
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps = self.backbone.maps(images, self.blocks)
        return {task: head(taps) for task, head in self.heads.items()}

    @property
    def stock(self) -> nn.Module:
        """The timm model, without a classifier."""
        return self.backbone.vit


def default_blocks(depth: int) -> list[int]:
    """Four blocks spread evenly, the last among them: after 3, 6, 9, 12 of 12, after 6, 12, 18, 24 of 24 (TaskPrompter)."""
    return [-(-quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)]


def check_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """The blocks from 0; UserError unless they lie in the model, from shallow to deep, and end with its last."""
    found = [block % depth for block in blocks if -depth <= block < depth]
    if len(found) < len(blocks) or not found or found != sorted(found) or found[-1] != depth - 1:
        raise UserError(
            f"blocks: {list(blocks)}; name blocks from 0 to {depth - 1}, shallow to deep, that end with {depth - 1}."
        )
    return found


class DenseObjective(TaskObjective):
    """objective(batch) -> {"loss", "<task>", ...}, scalars. batch: a collated sample (dense_sample.py), which may lack targets.

    tasks: those of the net's heads, any order. balancer: None for the weighted sum. balanced: the parameters whose gradients it
    sees. retain: needs the task semseg. fade: the schedule that the net's routers follow. All of them are children: their state
    is saved with the training. `step()` follows each optimiser step.
    "<task>": the task's loss without its weight, NaN for a batch without a valid pixel. Logged besides: "retain" (L_QR), "fade"
    (a), "weight/<task>" (a balancer's alpha). Raises UserError for tasks that are not the heads', and retain without semseg.
    """

    def __init__(
        self,
        net: DenseNet,
        tasks: Sequence[DenseTask],
        balancer: Balancer | None = None,
        balanced: Sequence[Tensor] = (),
        retain: DenseRetaining | None = None,
        fade: RouterFade | None = None,
    ) -> None:
        super().__init__(net, balancer, balanced, retain, fade)
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks) or set(self.tasks) != set(net.heads):
            raise UserError(
                f"dense: tasks {[task.name for task in tasks]}, heads {list(net.heads)}; they must be the same."
            )
        if retain is not None and SEGMENTATION not in self.tasks:
            raise UserError(f"retain: compares class logits and needs the task {SEGMENTATION}; set retain to null.")

    def forward(self, batch: Sample) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        logits = {name: value.float() for name, value in self.net(batch["image"]).items()}
        # Of no element, and so a zero of every head whatever its logits are.
        idle = sum(value.flatten()[:0].sum() for value in logits.values())
        for name, task in self.tasks.items():
            loss = self._loss(task, logits[name], batch)
            found[name] = idle.detach() * torch.nan if loss is None else loss.detach()
            if loss is not None:
                losses[name] = task.loss_weight * loss
        loss = (sum(losses.values()) if self.balancer is None else self.balance(losses)) + idle
        if self.retain is not None:
            pull = self._retain(logits[SEGMENTATION], batch)
            loss, found["retain"] = loss + pull, pull.detach()
        return {"loss": loss, **found, **self.logged()}

    def _loss(self, task: DenseTask, logits: Tensor, batch: Sample) -> Tensor | None:
        target = batch.get(task.key)
        return None if target is None else task.loss(task.resized(logits, target.shape[-2:]), target)

    def _retain(self, logits: Tensor, batch: Sample) -> Tensor:
        """L_QR, 0 without a valid pixel. Every process takes part in the bank, also where no image is labelled."""
        target = batch.get(SEGMENTATION)
        if target is None:
            height, width = batch["image"].shape[-2:]
            target = blank(SEGMENTATION, height, width).to(logits.device).expand(len(logits), -1, -1)
        pull = self.retain.loss(logits, target)
        self.remember(logits, target)
        return logits.flatten()[:0].sum() if pull is None else pull
