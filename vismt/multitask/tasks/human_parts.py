"""Human parts: segmentation into background and 6 parts of PASCAL-Context people, with weight 2 (ASTMT, arXiv 1904.08918; InvPT).

As in ASTMT's loader, the target is 0, background, on everything but annotated parts, also on people whose parts nobody annotated.
Images without annotated parts have no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vismt.data.formats.pascal_context import PARTS
from vismt.multitask.tasks.base import PASCAL_WEIGHTS
from vismt.multitask.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True, eq=False)
class HumanParts(Segmentation):
    """The task "parts"; options of `Segmentation`, with 7 classes as the default."""

    name, key = "parts", "parts"
    classes: int = len(PARTS)
    loss_weight: float = PASCAL_WEIGHTS["parts"]

    @property
    def default_class_names(self) -> Sequence[str]:
        return PARTS if self.classes == len(PARTS) else ()
