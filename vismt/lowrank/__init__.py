"""The low-rank core: factors, initialisers, adapter layers, banks, sums, storage. It needs torch, einops and safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.lowrank.factors import LowRank
    from vismt.lowrank.files.combining import combine, interference
    from vismt.lowrank.files.updates import Updates, read_updates
    from vismt.lowrank.model.merge import erased_by_rounding
    from vismt.lowrank.model.starts import fill_starts

__all__ = ["LowRank", "Updates", "combine", "erased_by_rounding", "fill_starts", "interference", "read_updates"]

__getattr__, __dir__ = exports(__name__)
