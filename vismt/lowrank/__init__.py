"""The low-rank core: factors, start values, adapter layers, sums of adapters, and files.

The core needs torch, einops, safetensors and regex.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.lowrank.factors import LowRank as LowRank
    from vismt.lowrank.files.combining import combine as combine
    from vismt.lowrank.files.combining import interference as interference
    from vismt.lowrank.files.updates import Updates as Updates
    from vismt.lowrank.files.updates import read_updates as read_updates
    from vismt.lowrank.model.merge import erased_by_rounding as erased_by_rounding
    from vismt.lowrank.model.starts import fill_starts as fill_starts

__getattr__, __dir__ = exports(__name__)
