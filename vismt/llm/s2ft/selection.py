"""The units that S2FT trains: a few heads and channels of each structure, chosen at random.

S2FT, arXiv 2412.06289. The paper's text takes a few units of each block, as is done here. Its code draws over all layers
together, so that many layers get no unit. Left out: the paper's scores of units (weights, activations, gradients), which have
no released code, and a coupled choice for v and o, u and d.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vismt.base.errors import UserError, need_names, require_known, shown_value
from vismt.llm.s2ft.structures import UNIT_PARTS, UnitBlock, structures
from vismt.lowrank.model.record import refuse_adapted
from vismt.lowrank.model.targets import match_patterns


@dataclass(frozen=True)
class UnitSelection:
    """The chosen units of a model.

    units: Unit numbers in ascending order, {container: {part: units}}. The parts "v" and "o" count heads, "u" and "d" channels.
    """

    units: Mapping[str, Mapping[str, tuple[int, ...]]]

    def digest(self) -> str:
        """Return the SHA-256 of the selection. Equal selections have equal digests."""
        plain = {path: {part: list(units) for part, units in parts.items()} for path, parts in self.units.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def count(self, part: str) -> int:
        """Return the number of chosen units of one part in the whole model."""
        return sum(len(parts.get(part, ())) for parts in self.units.values())


def select_units(
    model: nn.Module,
    ratio: float | Mapping[str, float] = 0.02,
    parts: Sequence[str] | None = None,
    seed: int = 0,
    *,
    exclude: str | UnitSelection | Sequence[str | UnitSelection] = (),
) -> UnitSelection:
    """Choose units of a stock model at random.

    Args:
        model: Model with attention or feed-forward structures that vismt.llm.s2ft.structures recognises.
        ratio: Share of the units, in (0, 1], as one number for all parts or {part: ratio} (0 for none). Of the n units of each
            container max(1, round(ratio n)) are chosen.
        parts: Parts among "v", "o", "u" and "d". None means the parts that a mapping of ratios names, or o and d for a single
            ratio. If both are given, the mapping has a ratio for each of these parts and none above 0 for another part. With
            grouped queries the units of "v" are the key-value heads.
        seed: Seed of the choice. The units of one part of a container depend on the seed and their path alone.
        exclude: Earlier selections, whose units are not chosen again, and containers (full-path regex or suffix), from which no
            unit is chosen.

    Returns:
        The selection, which method "s2ft" takes as its argument `selection`.

    Raises:
        UserError: If the model has no known structures, a name is unknown, a ratio is wrong, or there are too few units.
    """
    refuse_adapted(model)
    ratios = _ratios(ratio, parts)
    excluded = need_names("select_units.exclude:", exclude, UnitSelection)
    blocks = _wanted_blocks(model, ratios, [entry for entry in excluded if isinstance(entry, str)])
    earlier = [entry.units for entry in excluded if isinstance(entry, UnitSelection)]
    chosen: dict[str, dict[str, tuple[int, ...]]] = {}
    for (path, part), block in blocks.items():
        taken = {unit for units in earlier for unit in units.get(path, {}).get(part, ())}
        free = [unit for unit in range(block.units) if unit not in taken]
        count = max(1, round(ratios[part] * block.units))
        if count > len(free):
            raise UserError(
                f"select_units: {count} units of '{part}' wanted of {path}, {len(free)} are left; lower ratio."
            )
        drawn = random.Random(f"{seed}:{path}:{part}").sample(free, count)
        chosen.setdefault(path, {})[part] = tuple(sorted(drawn))
    if not chosen:
        raise UserError(f"select_units: ratio {ratio} chooses nothing; raise it.")
    return UnitSelection(chosen)


def _ratios(ratio: float | Mapping[str, float], parts: Sequence[str] | None) -> dict[str, float]:
    wanted = ["o", "d"] if parts is None else need_names("select_units.parts:", parts)
    require_known("select_units.parts: no", wanted, UNIT_PARTS)
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(wanted, ratio)
    require_known("select_units.ratio: no part", ratios, UNIT_PARTS)
    for part, value in ratios.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"select_units.ratio: {shown_value(value)} for '{part}'; it must be a number from 0 to 1.")
    for part in () if parts is None else UNIT_PARTS:
        if ratios.get(part) and part not in wanted:
            raise UserError(
                f"select_units: ratio has '{part}', parts {wanted} has not; add it to parts or leave parts out."
            )
        if part in wanted and part not in ratios:
            raise UserError(
                f"select_units: parts has '{part}', ratio {dict(ratios)} has not; give it a ratio, 0 for none."
            )
    return {part: float(value) for part, value in ratios.items()}


def _wanted_blocks(
    model: nn.Module, ratios: Mapping[str, float], excluded: Sequence[str]
) -> dict[tuple[str, str], UnitBlock]:
    """Return the rows or columns of all wanted parts outside the excluded containers, part by part in the order of UNIT_PARTS."""
    containers = structures(model)
    left = {path for paths in match_patterns("select_units.exclude", excluded, containers).values() for path in paths}
    blocks = {}
    for part in [part for part in UNIT_PARTS if ratios.get(part)]:
        found = {
            (path, part): structure.parts[part]
            for path, structure in containers.items()
            if part in structure.parts and path not in left
        }
        if not found:
            reasons = [structure.without_v for structure in containers.values() if part == "v" and structure.without_v]
            why = f": {reasons[0]}" if reasons else ""
            raise UserError(f"select_units: {type(model).__name__} has nothing known to take part '{part}' from{why}.")
        blocks.update(found)
    return blocks
