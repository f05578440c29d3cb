"""The units that S2FT trains: a few heads and channels of each structure, chosen at random or by a score (scores.py).

S2FT, arXiv 2412.06289. The paper's text takes a few units of each block and compares these strategies; its code has the random
strategy only, drawn over all layers together, so that many layers get no unit. budget='global' is that draw, in the order of
the code (v, o, u, d from one stream); 'per_layer', the paper's, is the default here. Ties go to the lower unit.
Left out: a coupled choice for v and o, u and d, which the code does not have either.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vismt.base.errors import UserError, need_names, require_known, shown_value
from vismt.llm.s2ft.scores import SCORES, Slot, unit_scores
from vismt.llm.s2ft.structures import PARTS, UnitBlock, structures
from vismt.lowrank.model.record import refuse_adapted
from vismt.lowrank.model.targets import match_patterns

STRATEGIES = ("random", *SCORES)
BUDGETS = ("per_layer", "global")


@dataclass(frozen=True)
class UnitSelection:
    """The chosen units of a model.

    units: {container: {part: units in ascending order}}; parts 'v' and 'o' count heads, 'u' and 'd' channels.
    """

    units: Mapping[str, Mapping[str, tuple[int, ...]]]

    def digest(self) -> str:
        """Return the SHA-256 of the selection; equal selections have equal digests."""
        plain = {path: {part: list(units) for part, units in parts.items()} for path, parts in self.units.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def count(self, part: str) -> int:
        """Return the number of chosen units of one part in the whole model."""
        return sum(len(parts.get(part, ())) for parts in self.units.values())


def select_units(
    model: nn.Module,
    strategy: str = "random",
    ratio: float | Mapping[str, float] = 0.02,
    budget: str = "per_layer",
    parts: Sequence[str] | None = None,
    largest: bool = False,
    seed: int = 0,
    calibration: Iterable[Any] | None = None,
    *,
    exclude: str | UnitSelection | Sequence[str | UnitSelection] = (),
) -> UnitSelection:
    """Choose units of a stock model.

    Args:
        model: a model with attention or feed-forward structures that vismt.llm.s2ft.structures recognises.
        strategy: "random", "weight", "activation", "product" or "gradient" (see scores.py).
        ratio: share of the units, in (0, 1], one number for all parts or {part: ratio} (0 for none).
        budget: "per_layer" takes max(1, round(ratio n)) of the n units of each container, "global" int(ratio n) of the n units
            of all containers together.
        parts: of 'v', 'o', 'u', 'd'. None means the parts that a mapping of ratios names, or o and d for a single ratio. If
            both are given, the mapping has a ratio for each of these parts and none above 0 for another. With grouped queries
            the units of 'v' are the key-value heads.
        largest: choose the highest scores instead of the lowest.
        seed: of the random strategy.
        calibration: for activation, product and gradient, a list of batches or one batch: a mapping of the model's arguments
            (an attention_mask leaves out padding), a tensor, or (inputs, labels). gradient takes the output's .loss, or the
            cross-entropy with the labels, for language models (labels (b, n), -100 is ignored) that of the next token.
        exclude: earlier selections, whose units are not chosen again, and containers (full-path regex or suffix), from which
            no unit is chosen and which do not count for the ratio.

    Returns:
        The selection, the `selection` argument of method 's2ft'.

    Raises:
        UserError: a model without known structures, an unknown name, a wrong ratio, or too few units.
    """
    refuse_adapted(model)
    require_known("select_units.strategy: no", [strategy], STRATEGIES)
    require_known("select_units.budget: no", [budget], BUDGETS)
    ratios = _ratios(ratio, parts)
    excluded = need_names("select_units.exclude:", exclude, UnitSelection)
    blocks = _wanted_blocks(model, ratios, [entry for entry in excluded if isinstance(entry, str)])
    earlier = [entry.units for entry in excluded if isinstance(entry, UnitSelection)]
    taken = {slot: {u for units in earlier for u in units.get(slot[0], {}).get(slot[1], ())} for slot in blocks}
    scores = None if strategy == "random" else unit_scores(model, strategy, blocks, calibration)
    together = budget == "global"
    pools: dict[str, list[Slot]] = {}  # what a number of units is chosen from
    for path, part in blocks:
        pools.setdefault(part if together else f"{path}:{part}", []).append((path, part))
    stream = random.Random(seed)
    chosen: dict[Slot, list[int]] = {slot: [] for slot in blocks}
    for name, slots in pools.items():
        path, part = slots[0]
        free = [(slot, unit) for slot in slots for unit in range(blocks[slot].units) if unit not in taken[slot]]
        share = ratios[part] * sum(blocks[slot].units for slot in slots)
        count = int(share) if together else max(1, round(share))
        if count > len(free):
            where = "the model" if together else path
            raise UserError(
                f"select_units: {count} units of '{part}' wanted of {where}, {len(free)} are left; lower ratio."
            )
        if scores is None:
            # A draw of one layer depends on (seed, path, part) alone.
            drawn = (stream if together else random.Random(f"{seed}:{name}")).sample(free, count)
        else:
            sign = -1 if largest else 1
            drawn = sorted(free, key=lambda candidate: sign * float(scores[candidate[0]][candidate[1]]))[:count]
        for slot, unit in drawn:
            chosen[slot].append(unit)
    units: dict[str, dict[str, tuple[int, ...]]] = {}
    for (path, part), numbers in chosen.items():
        if numbers:
            units.setdefault(path, {})[part] = tuple(sorted(numbers))
    if not units:
        raise UserError(f"select_units: ratio {ratio} chooses nothing; raise it or take budget='per_layer'.")
    return UnitSelection(units)


def _ratios(ratio: float | Mapping[str, float], parts: Sequence[str] | None) -> dict[str, float]:
    wanted = ["o", "d"] if parts is None else need_names("select_units.parts:", parts)
    require_known("select_units.parts: no", wanted, PARTS)
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(wanted, ratio)
    require_known("select_units.ratio: no part", ratios, PARTS)
    for part, value in ratios.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"select_units.ratio: {shown_value(value)} for '{part}'; it must be a number from 0 to 1.")
    for part in () if parts is None else PARTS:
        if ratios.get(part) and part not in wanted:
            raise UserError(
                f"select_units: ratio has '{part}', parts {wanted} has not; add it to parts or leave parts out."
            )
        if part in wanted and part not in ratios:
            raise UserError(
                f"select_units: parts has '{part}', ratio {dict(ratios)} has not; give it a ratio, 0 for none."
            )
    return {part: float(value) for part, value in ratios.items()}


def _wanted_blocks(model: nn.Module, ratios: Mapping[str, float], excluded: Sequence[str]) -> dict[Slot, UnitBlock]:
    """Return the rows or columns of all wanted parts outside the excluded containers, part by part in the order of PARTS."""
    containers = structures(model)
    left = {path for paths in match_patterns("select_units.exclude", excluded, containers).values() for path in paths}
    blocks = {}
    for part in [part for part in PARTS if ratios.get(part)]:
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
