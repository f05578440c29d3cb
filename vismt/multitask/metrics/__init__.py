"""Metrics of dense multi-task prediction, pooled over a whole data set.

Each metric has `update(pred, target, ...)` for one batch on any device, `compute()` -> dict of plain numbers, and `reset()`.
They are torchmetrics Metrics with sums as states. Under torch.distributed, `compute` adds the states of all processes. The
states are on the metric's device (`metric.to(device)`). NCCL needs a GPU. MPS devices have no fp64, so keep the metric on the
CPU there. Shares are fractions in [0, 1]. `compute` also returns the number of pixels or images. Importing this package imports
torchmetrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.multitask.metrics.boundary import BoundaryF as BoundaryF
    from vismt.multitask.metrics.classes import Accuracy as Accuracy
    from vismt.multitask.metrics.classes import MeanIoU as MeanIoU
    from vismt.multitask.metrics.delta import delta_m as delta_m
    from vismt.multitask.metrics.depth import DepthErrors as DepthErrors
    from vismt.multitask.metrics.normals import NormalErrors as NormalErrors
    from vismt.multitask.metrics.saliency import MaxF as MaxF

__getattr__, __dir__ = exports(__name__)
