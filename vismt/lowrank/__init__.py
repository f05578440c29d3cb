"""The low-rank core: factors, initialisers, adapter layers, banks, sums, storage. It needs torch, einops and safetensors."""

from vismt.lowrank.combining import combine
from vismt.lowrank.detached_updates import Updates, read_updates
from vismt.lowrank.factors import LowRank
from vismt.lowrank.rounding import erased_by_rounding
from vismt.lowrank.starts import fill_starts

__all__ = ["LowRank", "Updates", "combine", "erased_by_rounding", "fill_starts", "read_updates"]
