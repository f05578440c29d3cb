"""Nets of several tasks: one label space for classification, and one backbone with a head for each dense task.

    labels of task t: offset_t .. offset_t + k_t - 1, offset_t = k_1 + .. + k_{t-1}, in one head of C = sum k_t outputs

In the label space "union" the net predicts a class among all C (task-agnostic inference). The class of another task is an
error. "separate" is the usual, easier problem (task-aware inference). It has a softmax over the classes of each task, and the
task is given at test time. Separate heads are rows of one matrix, so training does not differ otherwise, and every head is in
the graph of every process. EMTAL, Zhong et al., NeurIPS 2024, arXiv 2501.06884, sections 2 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.backbones.pyramid import Pyramid
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.multitask.heads import Head
from vismt.multitask.streams import task_features

LABEL_SPACES = ("union", "separate")
SEGMENTATION = "semseg"


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
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts, dtype=torch.int64))


class TaskClassifier(nn.Module):
    """A classifier over the union for the images of one task: (b, 3, h, w) -> logits (b, C).

    Args:
        net: Net from images to logits (b, C).
        union: Label space.
        task: Number of the task.
        task_aware: Whether the labels of other tasks are excluded, as with separate heads. Their logits then become large
            negative finite numbers and not -inf, because an attack that subtracts logits would turn -inf into NaN.
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


class DenseNet(nn.Module):
    """A backbone with a head for each task: images (b, 3, h, w) in [0, 1] -> {task: logits (b, channels, R, C)}.

    h and w are the backbone's input size, square or not. Tasks of whole images have logits (b, channels) from a PooledHead, or,
    in one label space, (b, C) from the rows of all their heads. If the backbone has features of tasks (streams.py), the head of
    a task reads its own features.

    Args:
        backbone: ViT, or a hierarchical model, whose taps are its stages.
        heads: Heads by task, at least one.
        blocks: Numbers of the blocks whose outputs are the taps of the heads, from shallow to deep, one for each width of a
            head. The last must be the model's last block, because later blocks would be trained but never run.
        union: Tasks of whole images in one label space. Each gets the logits (b, C) of all of them, side by side.

    Raises:
        UserError: If no head is given, the blocks do not end with the last block, or a head has other widths.
    """

    def __init__(
        self, backbone: Backbone | Pyramid, heads: Mapping[str, Head], blocks: Sequence[int], union: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.union = tuple(union)
        self.backbone, self.blocks = backbone, check_blocks(blocks, backbone.depth)
        widths = tuple(backbone.widths[block] for block in self.blocks)
        if not heads:
            raise UserError("dense net: no head; give a head for at least one task.")
        for task, head in heads.items():
            if head.widths != widths:
                raise UserError(
                    f"dense net: the head of '{task}' takes taps of widths {list(head.widths)}, the net has {list(widths)}."
                )
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with task_features(list(self.heads)) as features:
            shared = self.backbone.maps(images, self.blocks)
        read = dict(zip(self.blocks, map(self.stock.get_submodule, self.read_blocks))) if features.own else {}
        own = {
            number: self.backbone.as_maps(features.own[block]).unflatten(0, (len(self.heads), -1))
            for number, block in read.items()
            if block in features.own
        }
        if len(own) < len(features.own):
            raise UserError(
                f"dense net: the model has features of tasks in {len(features.own)} blocks, of which its heads read {len(own)}; "
                f"name blocks of {', '.join(self.read_blocks)} in adapt.options.task_blocks."
            )
        outputs = {}
        for number, (task, head) in enumerate(self.heads.items()):
            outputs[task] = head([own[n][number] if n in own else map for n, map in zip(self.blocks, shared)])
        if self.union:
            outputs |= dict.fromkeys(self.union, torch.cat([outputs[task] for task in self.union], 1))
        return outputs

    @property
    def stock(self) -> nn.Module:
        """The timm model without a classifier."""
        return self.backbone.vit

    @property
    def read_blocks(self) -> list[str]:
        """Paths in `stock` of the blocks whose outputs the heads read."""
        return [self.backbone.last_block(tap) for tap in self.blocks]


def default_blocks(depth: int) -> list[int]:
    """Return four evenly spaced taps that end with the last: 3, 6, 9, 12 of 12, 6, 12, 18, 24 of 24 (TaskPrompter).

    Of five stages these are the last four. Of fewer than four, some count twice.
    """
    return [-(-quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)]


def check_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """Return the blocks counted from 0. Raise UserError unless they exist, are sorted and end with the model's last block."""
    numbers = [block % depth for block in blocks if -depth <= block < depth]
    if len(numbers) < len(blocks) or not numbers or numbers != sorted(numbers) or numbers[-1] != depth - 1:
        raise UserError(
            f"blocks: {list(blocks)}; name blocks from 0 to {depth - 1}, shallow to deep, that end with {depth - 1}."
        )
    return numbers
