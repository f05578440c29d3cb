"""One adapted module as data (Site), its plan from rank, alpha and shape, and the report over all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from torch import nn

from vismt.errors import UserError
from vismt.lowrank.targets import kind_of, matrix_shape


@dataclass(frozen=True)
class Site:
    """One adapted module: what is needed to build it again on a stock model."""

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    blocks: tuple[int, ...]
    core: str = ""  # "full" or "diagonal": what stands between the factors of each block, nothing where empty
    # Set for an update that is no pair of factors but `rank` rows (0) or columns (1) of the matrix, and how they are held.
    dim: int | None = None
    mode: str = ""
    experts: int | None = None  # groups that the rank consists of, gated per sample
    grid: str = ""  # of nf4.GRIDS where the weight below is what the grid holds of W less the start, see quantized.py

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Of the cores of all blocks, stacked; empty without one."""
        rows = len(self.blocks) * self.rank
        return {"": (), "full": (rows, self.rank), "diagonal": (rows,)}[self.core]

    @property
    def parameters(self) -> int:
        if self.dim is not None:
            return self.rank * self.shape[1 - self.dim]
        core = prod(self.core_shape) if self.core else 0
        return self.rank * (self.shape[0] + len(self.blocks) * self.shape[1]) + core

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what an adapter file holds for this module, by name; a kept start may come beside."""
        if self.dim is None:
            core = {"lora_C": self.core_shape} if self.core else {}
            A, B = (len(self.blocks) * self.rank, self.shape[1]), (self.shape[0], self.rank)
            return {"lora_A": A, "lora_B": B, **core, **({"start_A": A, "start_B": B} if self.grid else {})}
        values = (self.rank, self.shape[1]) if self.dim == 0 else (self.shape[0], self.rank)
        start = {} if self.mode == "delta" else {"slice_start": values}
        return {"slice_index": (self.rank,), "slice_values": values, **start}


@dataclass
class AdaptReport:
    """What `adapt` did. Printing it gives a table, one row for each group of like modules."""

    method: str
    sites: list[Site]
    trainable: int
    total: int
    skipped: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # a line for each kind of trainable part beside the updates

    def __str__(self) -> str:
        groups: dict[tuple, list[Site]] = {}
        for site in self.sites:
            path = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", site.path)
            key = (path, site.kind, site.shape, site.rank, site.scale, len(site.blocks))
            groups.setdefault(key, []).append(site)
        rows = [("module", "count", "kind", "out x in", "rank", "scale", "parameters")]
        for (path, kind, shape, rank, scale, blocks), sites in groups.items():
            ranks = f"{blocks} x {rank}" if blocks > 1 else str(rank)
            count = sum(site.parameters for site in sites)
            rows.append((path, str(len(sites)), kind, f"{shape[0]} x {shape[1]}", ranks, f"{scale:g}", f"{count:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if not self.sites:
            lines.clear()
        lines.extend([*self.beside, self.summary()])
        lines.extend(f"left out: {text}" for text in self.skipped)
        return "\n".join(lines)

    def summary(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        modules = f"{len(self.sites)} modules   " if self.sites else ""
        return f"{self.method}   {modules}{self.trainable:,} trainable of {self.total:,} ({share:.2f} %)"


def factor_rank(sites: Sequence[Site]) -> int:
    """The largest rank of a pair of factors, 0 where there is none: slices and whole layers have no rank."""
    return max((site.rank for site in sites if site.dim is None), default=0)


def qkv_blocks(path: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Three equal output blocks for a fused timm projection named qkv."""
    if path.split(".")[-1] == "qkv" and out_features % 3 == 0:
        return (out_features // 3,) * 3
    return (out_features,)


def plan_site(
    path: str,
    module: nn.Module,
    rank: int,
    alpha: float | None,
    *,
    rslora: bool,
    clamp_rank: bool,
    split_qkv: bool,
    core: str = "",
    experts: int | None = None,
    grid: str = "",
) -> Site:
    """Shape, rank, scale and blocks of one module; UserError for a rank that does not fit."""
    kind = kind_of(module)
    out_features, in_features = matrix_shape(module)
    blocks = qkv_blocks(path, out_features, in_features) if split_qkv else (out_features,)
    largest = min(*blocks, in_features)
    if rank > largest:
        if not clamp_rank:
            raise UserError(
                f"adapt.rank: {rank} for '{path}' ({out_features} x {in_features}) is larger than {largest}. "
                "Lower it, give rank_pattern, or set clamp_rank=True."
            )
        rank = largest
    if experts is not None and rank % experts:
        raise UserError(
            f"adapt.n_experts: {experts} experts cannot share the rank {rank} of '{path}' evenly; give a rank that is a "
            f"multiple of {experts}, or other n_experts."
        )
    numerator = float(rank if alpha is None else alpha) * (experts or 1)
    scale = numerator / (rank**0.5 if rslora else rank)
    return Site(path, str(kind), (out_features, in_features), rank, scale, blocks, core, experts=experts, grid=grid)
