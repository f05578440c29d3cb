"""Human parts: segmentation into background and 6 parts of PASCAL-Context people, with weight 2 (ASTMT, arXiv 1904.08918; InvPT).

Where a person is not annotated the target is 255, and images without people have no target at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from vismt.multitask.tasks.base import PASCAL_WEIGHTS
from vismt.multitask.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts(Segmentation):
    """parts. Options as of `Segmentation`."""

    name, key = "parts", "parts"
    classes: int = 7
    loss_weight: float = PASCAL_WEIGHTS["parts"]
