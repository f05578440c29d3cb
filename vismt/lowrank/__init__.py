"""The low-rank core: factors, initialisers, adapter layers, banks, sums, storage. It needs torch, einops and safetensors."""

from vismt.lowrank.combining import combine
from vismt.lowrank.detached_updates import Updates, read_updates
from vismt.lowrank.factors import LowRank
from vismt.lowrank.inject import fill_starts
from vismt.lowrank.rounding import erased_by_rounding

__all__ = ["LowRank", "Updates", "combine", "erased_by_rounding", "fill_starts", "read_updates"]
