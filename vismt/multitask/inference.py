"""Inference of a dense net on images of its input size or larger: overlapping windows, the mirrored image, and several scales.

    prediction(p) = mean over scales of the mean of the predictions at pixel p over all views (window, mirrored or not) that
                    contain p, for the image enlarged by the scale; predictions are resized to the image's own size

Windows have the net's input size and equal distances. Neighbours share `overlap` of a side or more, and all windows have the
same weight (the sliding inference of semantic segmentation). The mean is taken over the head's output (logits and depths). For
normals it is taken over unit vectors (`Task.view`), because a long vector would dominate. Depth of an enlarged image is
converted to the unit of the image (`Task.rescaled`). The prediction of a single window without mirroring at the image's own
scale is returned unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.maps.dense_transforms import FILL
from vismt.multitask.nets import DenseNet
from vismt.multitask.tasks import MapTask, Task

LARGEST_SCALE = 8  # beyond it an image has thousands of windows


def predict(
    net: DenseNet,
    tasks: Mapping[str, Task],
    images: Tensor,
    *,
    overlap: float = 0.5,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> dict[str, Tensor]:
    """Predict all tasks for images of any size. Sides shorter than the net's are padded with grey and cropped again.

    Args:
        net: Net.
        tasks: Tasks of the net's heads by name.
        images: Images (b, 3, h, w) in [0, 1].
        overlap: Share of a side that neighbouring windows have in common, in [0, 1).
        flip: Whether to average with the predictions for the mirrored images.
        scales: Factors by which the images are enlarged. The predictions are averaged over them.

    Returns:
        Predictions by task, fp32 (b, channels, h, w), or (b, channels) for tasks of whole images.

    Raises:
        UserError: If the scales are not different numbers above 0.
    """
    check_scales(scales)
    if list(scales) == [1]:
        return _at_own_scale(net, tasks, images, overlap, flip)
    size = images.shape[-2:]
    totals: dict[str, Tensor] = {}
    for scale in scales:
        scaled = [max(1, round(side * scale)) for side in size]
        enlarged = images if scaled == list(size) else _resized(images, scaled)
        for name, value in _at_own_scale(net, tasks, enlarged, overlap, flip).items():
            task = tasks[name]
            prediction = task.rescaled(task.view(value, False), scale)
            if isinstance(task, MapTask):
                prediction = _resized(prediction, size)
            totals[name] = totals.get(name, 0) + prediction / len(scales)
    return totals


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=False, antialias=True)


def _at_own_scale(
    net: DenseNet, tasks: Mapping[str, Task], images: Tensor, overlap: float, flip: bool
) -> dict[str, Tensor]:
    size = net.backbone.img_size
    height, width = images.shape[-2:]
    below, right = max(0, size[0] - height), max(0, size[1] - width)
    padded = F.pad(images, (0, right, 0, below), value=FILL) if below or right else images
    corners = itertools.product(*(starts(side, window, overlap) for side, window in zip(padded.shape[-2:], size)))
    views = [(corner, mirrored) for corner in corners for mirrored in ((False, True) if flip else (False,))]
    if len(views) == 1:
        predictions = _predict_window(net, tasks, padded, size)
    else:
        predictions = _mean_of_views(net, tasks, padded, views, size)
    return {
        name: value[..., :height, :width] if isinstance(tasks[name], MapTask) else value
        for name, value in predictions.items()
    }


def starts(side: int, window: int, overlap: float) -> list[int]:
    """Return the first pixels of the fewest windows that cover `side` >= window pixels at equal distances.

    Neighbouring windows share `overlap` of their side or more.
    """
    steps = math.ceil((side - window) / max(1.0, window * (1 - overlap)))
    return [round(step * (side - window) / steps) for step in range(steps + 1)] if steps else [0]


def check_scales(scales: Sequence[float]) -> None:
    """Raise UserError unless `scales` are different numbers above 0, at most 8."""
    numbers = [scale for scale in scales if not isinstance(scale, bool) and 0 < scale <= LARGEST_SCALE]
    if not numbers or len(set(numbers)) < len(scales):
        raise UserError(
            f"scales: {list(scales)}; name factors of the image size above 0 and up to {LARGEST_SCALE}, each once; [1.0] takes "
            "images at their own size."
        )


def _mean_of_views(
    net: DenseNet,
    tasks: Mapping[str, Task],
    images: Tensor,
    views: Sequence[tuple[tuple[int, ...], bool]],
    size: tuple[int, int],
) -> dict[str, Tensor]:
    """Return the predictions averaged over views ((top, left), mirrored) of the images."""
    totals: dict[str, Tensor] = {}
    count = images.new_zeros(images.shape[-2:])
    for (top, left), mirrored in views:
        place = (..., slice(top, top + size[0]), slice(left, left + size[1]))
        window = images[place]
        for name, value in _predict_window(net, tasks, window.flip(-1) if mirrored else window, size).items():
            prediction = tasks[name].view(value, mirrored)
            if isinstance(tasks[name], MapTask):
                total = totals.setdefault(name, prediction.new_zeros(*prediction.shape[:2], *images.shape[-2:]))
                total[place] += prediction
            else:
                totals[name] = totals.get(name, 0) + prediction
        count[place] += 1
    return {name: total / (count if isinstance(tasks[name], MapTask) else len(views)) for name, total in totals.items()}


def _predict_window(
    net: DenseNet, tasks: Mapping[str, Task], images: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the predictions, resized to `size`, for images of the net's input size."""
    return {name: tasks[name].resized(value.float(), size) for name, value in net(images).items()}
