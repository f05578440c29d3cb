"""One adapted module as data (LayerSpec), and the report over all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vismt.lowrank.layers.base import AdapterLayer


@dataclass(frozen=True)
class LayerSpec:
    """One adapted module: the layer class and its settings, enough to build the layer on a stock model.

    path, kind, shape: of the stock module; kind is that of `targets.kind_of`, shape the (o, i) of its matrix.
    settings: an instance of `layer.Settings`.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    layer: type[AdapterLayer]
    settings: Any

    @property
    def parameters(self) -> int:
        """Number of trainable values of the update."""
        return self.layer.count_parameters(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an adapter file must hold for this module, by name."""
        return self.layer.tensor_shapes(self)


@dataclass
class AdaptReport:
    """What `adapt` did. Printing it gives a table, one row for each group of like modules.

    sites: the adapted modules. skipped: reasons for modules that were left out. extras: a line for each kind of trainable
    tensors besides the updates.
    """

    method: str
    sites: list[LayerSpec]
    trainable: int
    total: int
    skipped: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        groups: dict[tuple, list[LayerSpec]] = {}
        for spec in self.sites:
            path = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", spec.path)
            groups.setdefault((path, spec.kind, spec.shape, *spec.layer.describe(spec)), []).append(spec)
        rows = [("module", "count", "kind", "out x in", "rank", "scale", "parameters")]
        for (path, kind, shape, rank, scale), specs in groups.items():
            count = sum(spec.parameters for spec in specs)
            rows.append((path, str(len(specs)), kind, f"{shape[0]} x {shape[1]}", rank, scale, f"{count:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if not self.sites:
            lines.clear()
        lines.extend([*self.extras, self.summary()])
        lines.extend(f"left out: {text}" for text in self.skipped)
        return "\n".join(lines)

    def summary(self) -> str:
        """Return one line: the method, how many modules, the trainable share of the parameters."""
        share = 100 * self.trainable / max(self.total, 1)
        modules = f"{len(self.sites)} modules   " if self.sites else ""
        return f"{self.method}   {modules}{self.trainable:,} trainable of {self.total:,} ({share:.2f} %)"


def factor_rank(specs: Sequence[LayerSpec]) -> int:
    """Return the largest rank of a pair of factors; 0 where there is none."""
    return max((spec.layer.factor_rank(spec) for spec in specs), default=0)
