"""Near-duplicates in a set of images: frames of one object, or one picture twice.

The patch of an image is its grey values, averaged over 16 x 16 boxes, shifted to mean 0 and scaled to length 1. Two images of
a class are near-duplicates where the inner product of their patches, a correlation, is above 0.9, and a group is what a chain of
near-duplicates connects. Boxes and not a library's resizing, so that versions of libraries do not change the groups. Frames
that differ in scale, or by motion, correlate less and are not found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from vismt import console

SIDE = 16
CORRELATION = 0.9
CHUNK = 1024


def near_duplicates(read: Callable[[int], Tensor], labels: Tensor, name: str) -> Tensor:
    """Return the group of each image, int64 (n,): the index of the first image of its group.

    Every image is decoded once, and images of a class are compared each with each.

    Args:
        read: image i, (3, h, w).
        labels: int64 (n,).
        name: of the set, for the progress bar.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda i: _patch(read(i)), range(len(labels)))
        patches = torch.stack(list(console.track(found, "data", f"{name}: near-duplicates", len(labels))))
    groups = torch.arange(len(labels))
    for label in labels.unique():
        rest = (labels == label).nonzero().flatten()
        while len(rest):
            first, fresh, rest = rest[0], rest[:1], rest[1:]
            while len(fresh):
                near = (patches[rest] @ patches[fresh[:CHUNK]].T > CORRELATION).any(1)
                fresh, rest = torch.cat([fresh[CHUNK:], rest[near]]), rest[~near]
                groups[fresh] = first
    return groups


def _patch(image: Tensor) -> Tensor:
    grey = F.adaptive_avg_pool2d(rgb_to_grayscale(image.to(torch.float32)), SIDE).flatten()
    return F.normalize(grey - grey.mean(), dim=0)
