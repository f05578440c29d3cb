"""Boundaries: weighted binary cross-entropy of one logit (binary.py) with w = 0.95 on boundary pixels, 0.05 on the others.

w = 0.95 and loss weight 50: ASTMT (arXiv 1904.08918), InvPT, TaskPrompter, MTLoRA. `positive_weight=None` gives HED's w, the
share of pixels that are not boundaries. The score is odsF with max_dist 0.0075 of the diagonal for PASCAL and 0.011 for NYUD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vismt.multitask.tasks.base import IGNORE, PASCAL_WEIGHTS, check_count, check_number
from vismt.multitask.tasks.binary import BinaryTask

if TYPE_CHECKING:
    from torchmetrics import Metric

PASCAL_MAX_DIST, NYUD_MAX_DIST = 0.0075, 0.011


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges(BinaryTask):
    """The task "edge".

    Args:
        positive_weight: w in (0, 1), or None for the balanced weight.
        max_dist: largest distance of matched pixels in the metric, a fraction of the image diagonal.
        thresholds: number of thresholds of the metric; fewer are faster.
        loss_weight: factor of the loss, > 0.
    """

    name, key, channels = "edge", "edge", 1
    measure, label, share = "ods_f", "odsF", True
    positive_weight: float | None = 0.95
    max_dist: float = PASCAL_MAX_DIST
    thresholds: int = 99
    loss_weight: float = PASCAL_WEIGHTS["edge"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "max_dist", self.max_dist, 0, 1)
        check_count(self.name, "thresholds", self.thresholds, 1)

    def metric(self) -> Metric:
        from vismt.multitask.metrics import BoundaryF

        return BoundaryF(max_dist=self.max_dist, thresholds=self.thresholds, ignore_index=IGNORE)
