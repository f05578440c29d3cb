"""The dense sample: an image with any of the targets (maps or a class), and the value that means "missing" in each of them.

    image                            float32 (3, h, w) in [0, 1]
    semseg, parts, saliency, edge    int64 (h, w), 255 for unlabelled pixels; saliency and edge are 0 or 1
    depth                            float32 (h, w) in metres, 0 where missing
    normals                          float32 (3, h, w), unit length, x right, y up, z towards the camera; (0, 0, 0) where missing
    class, class:NAME                int64 (), of the whole image, in the classes of the task NAME where there are several, -1
                                     where missing: 255 can be a class

A sample may lack targets. A batch is the same dict with (b, ...) in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vismt.base.errors import UserError, near

IGNORE = 255
LABELS = ("semseg", "parts", "saliency", "edge")
MAPS = (*LABELS, "depth", "normals")
CLASS, NO_CLASS = "class", -1
_TARGETS = (*MAPS, CLASS)
Sample = dict[str, Tensor]


def class_key(task: str) -> str:
    """Return the target of a task of whole images, which has sets of its own unless it is called "classify"."""
    return CLASS if task == "classify" else f"{CLASS}:{task}"


def is_class(target: str) -> bool:
    """Return whether a target is a class of the whole image."""
    return target.partition(":")[0] == CLASS


def blank(target: str, height: int, width: int) -> Tensor:
    """Return a map of `target` without a valid pixel. For a class, return the missing class, for any size."""
    if is_class(target):
        return torch.tensor(NO_CLASS)
    if target in LABELS:
        return torch.full((height, width), IGNORE, dtype=torch.int64)
    return torch.zeros((3, height, width) if target == "normals" else (height, width))


def size_of(sample: Sample) -> tuple[int, int]:
    """Return (h, w) of a sample. Raise UserError for an unknown target, and for a map of another size than the image."""
    if "image" not in sample:
        raise UserError(f"dense sample: has no 'image', holds {sorted(sample)}.")
    height, width = sample["image"].shape[-2:]
    for name, values in sample.items():
        if name != "image" and name not in _TARGETS and not is_class(name):
            raise UserError(f"dense sample: target '{name}' is not known.{near(name, _TARGETS)}")
        wanted: tuple[int, ...] = (height, width)
        if is_class(name):
            wanted = ()
        elif name in ("image", "normals"):
            wanted = (3, height, width)
        if tuple(values.shape) != wanted:
            raise UserError(f"dense sample: '{name}' is {tuple(values.shape)}, must be {wanted} for its image.")
    return height, width


def collate(samples: Sequence[Sample]) -> Sample:
    """Return one batch of samples of one size. A target that some samples lack is blank there."""
    sizes = {size_of(sample) for sample in samples}
    if len(sizes) != 1:
        raise UserError(f"dense batch: the samples are of sizes {sorted(sizes)}; crop or resize them to one size.")
    height, width = sizes.pop()
    known = dict.fromkeys(("image", *_TARGETS, *(name for sample in samples for name in sample)))
    names = [name for name in known if any(name in sample for sample in samples)]
    return {
        name: torch.stack([sample[name] if name in sample else blank(name, height, width) for sample in samples])
        for name in names
    }
