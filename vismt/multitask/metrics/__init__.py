"""Metrics of dense multi-task prediction, pooled over a whole data set.

Each has `update(pred, target, ...)` for one batch on any device, `compute()` -> dict of plain numbers, and `reset()`. They are
torchmetrics' Metrics whose states are sums: under torch.distributed `compute` adds those of all processes. A metric counts on
the device it lies on (`metric.to(device)`; NCCL needs a GPU, an MPS device has no fp64, so leave it on the CPU there). Shares
are fractions in [0, 1]; a number comes with how many pixels or images it rests on. Importing this loads torchmetrics.
"""

from vismt.multitask.metrics.accuracy import Accuracy
from vismt.multitask.metrics.boundary import BoundaryF
from vismt.multitask.metrics.delta import delta_m
from vismt.multitask.metrics.depth import DepthErrors
from vismt.multitask.metrics.normals import NormalErrors
from vismt.multitask.metrics.saliency import MaxF
from vismt.multitask.metrics.segmentation import MeanIoU

__all__ = ["Accuracy", "BoundaryF", "DepthErrors", "MaxF", "MeanIoU", "NormalErrors", "delta_m"]
