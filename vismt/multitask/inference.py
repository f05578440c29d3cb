"""Prediction of a dense net on images of its own size or larger: overlapping windows, and the mirrored image as a second view.

    prediction(p) = mean over the views (window, mirrored or not) that hold pixel p of view's prediction(p)

Windows of the net's size stand at even distances, neighbours share `overlap` of a side or more, and every window weighs the same
(the sliding inference of semantic segmentation). What is averaged is what the head gives, logits and depths, but unit vectors
for normals (`DenseTask.view`): among vectors of unlike lengths the longest would decide. One window without a mirror is left as
it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vismt.data.dense_transforms import FILL
from vismt.errors import UserError
from vismt.multitask.dense import DenseNet
from vismt.multitask.tasks import DenseTask, MapTask


def predict(
    net: DenseNet, tasks: Mapping[str, DenseTask], images: Tensor, *, overlap: float = 0.5, flip: bool = False
) -> dict[str, Tensor]:
    """{task: fp32 (b, channels, h, w), (b, channels) of whole images} for images (b, 3, h, w) in [0, 1] of any size.

    tasks: those of the net's heads. A side shorter than the net's is padded with grey and cut off again. Raises UserError for an
    overlap outside of [0, 1).
    """
    check_overlap(overlap)
    size = net.backbone.img_size
    height, width = images.shape[-2:]
    below, right = max(0, size[0] - height), max(0, size[1] - width)
    padded = F.pad(images, (0, right, 0, below), value=FILL) if below or right else images
    places = [*itertools.product(*(starts(side, window, overlap) for side, window in zip(padded.shape[-2:], size)))]
    views = [(place, mirrored) for place in places for mirrored in ((False, True) if flip else (False,))]
    if len(views) == 1:
        found = _window(net, tasks, padded, size)
    else:
        found, count = {}, padded.new_zeros(padded.shape[-2:])
        for (top, left), mirrored in views:
            here = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            window = padded[here]
            for name, value in _window(net, tasks, window.flip(-1) if mirrored else window, size).items():
                part = tasks[name].view(value, mirrored)
                if isinstance(tasks[name], MapTask):
                    found.setdefault(name, part.new_zeros(*part.shape[:2], *padded.shape[-2:]))[here] += part
                else:
                    found[name] = found.get(name, 0) + part
            count[here] += 1
        found = {
            name: value / (count if isinstance(tasks[name], MapTask) else len(views)) for name, value in found.items()
        }
    return {
        name: value[..., :height, :width] if isinstance(tasks[name], MapTask) else value
        for name, value in found.items()
    }


def starts(side: int, window: int, overlap: float) -> list[int]:
    """First pixels of the fewest windows that cover `side` >= window pixels, at even distances, sharing `overlap` or more."""
    steps = math.ceil((side - window) / max(1.0, window * (1 - overlap)))
    return [round(step * (side - window) / steps) for step in range(steps + 1)] if steps else [0]


def check_overlap(overlap: Any) -> None:
    """UserError unless it is a share of a side."""
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap < 1:
        raise UserError(f"overlap: {overlap!r}; it is a share of a window's side, from 0 to below 1.")


def _window(net: DenseNet, tasks: Mapping[str, DenseTask], images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    return {name: tasks[name].resized(value.float(), size) for name, value in net(images).items()}
