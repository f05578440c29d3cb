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

from vismt.base.errors import UserError, require_known
from vismt.llm.s2ft.scores import SCORES, Scores, Slot, Slots, unit_scores
from vismt.llm.s2ft.structures import PARTS, Structure, structures
from vismt.lowrank.model.record import refuse_adapted
from vismt.lowrank.model.targets import check_patterns, matches

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

    def contains(self, path: str, part: str, unit: int) -> bool:
        """Return whether a unit of a container is chosen."""
        return unit in self.units.get(path, {}).get(part, ())


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
    excluded = [exclude] if isinstance(exclude, str | UnitSelection) else list(exclude)
    patterns = [entry for entry in excluded if isinstance(entry, str)]
    earlier = [entry for entry in excluded if isinstance(entry, UnitSelection)]
    slots = _slots(model, ratios, patterns)
    free = {
        (path, part): [
            unit
            for unit in range(block.units)
            if not any(selection.contains(path, part, unit) for selection in earlier)
        ]
        for (path, part), block in slots.items()
    }
    scores = None if strategy == "random" else unit_scores(model, strategy, slots, calibration)
    choose = _choose_per_layer if budget == "per_layer" else _choose_global
    units: dict[str, dict[str, tuple[int, ...]]] = {}
    for (path, part), chosen in choose(slots, free, ratios, scores, largest, seed).items():
        if chosen:
            units.setdefault(path, {})[part] = tuple(sorted(chosen))
    if not units:
        raise UserError(f"select_units: ratio {ratio} chooses nothing; raise it or take budget='per_layer'.")
    return UnitSelection(units)


def _slots(model: nn.Module, ratios: Mapping[str, float], patterns: Sequence[str]) -> Slots:
    """Return the slots of all wanted parts outside the excluded containers; raise UserError for a part without any."""
    containers = structures(model)
    check_patterns("select_units.exclude", patterns, list(containers))
    slots = {
        (path, part): structure.parts[part]
        for part in PARTS
        if ratios.get(part)
        for path, structure in containers.items()
        if part in structure.parts and not any(matches(pattern, path) for pattern in patterns)
    }
    for part in [part for part, value in ratios.items() if value]:
        if not any(slot_part == part for _, slot_part in slots):
            raise UserError(
                f"select_units: {type(model).__name__} has nothing known to take part '{part}' from"
                f"{_missing_reason(part, containers)}."
            )
    return slots


def _missing_reason(part: str, containers: Mapping[str, Structure]) -> str:
    """Return why a model has no units of 'v', as an addition to a sentence, where that is known."""
    reasons = [structure.without_v for structure in containers.values() if part == "v" and structure.without_v]
    return f": {reasons[0]}" if reasons else ""


def _ratios(ratio: float | Mapping[str, float], parts: Sequence[str] | None) -> dict[str, float]:
    """Return {part: ratio} of every wanted part; raise UserError where a mapping and explicit parts do not agree."""
    wanted = None
    if parts is not None:
        wanted = [parts] if isinstance(parts, str) else list(parts)
        require_known("select_units.parts: no", wanted, PARTS)
    names = ("o", "d") if wanted is None else wanted
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(names, ratio)
    require_known("select_units.ratio: no part", ratios, PARTS)
    for part, value in ratios.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"select_units.ratio: {value!r} for '{part}'; it must be a number from 0 to 1.")
    if wanted is not None:
        _check_parts(ratios, wanted)
    return {part: float(value) for part, value in ratios.items()}


def _check_parts(ratios: Mapping[str, float], wanted: Sequence[str]) -> None:
    """Raise UserError unless the parts with a ratio are the wanted parts."""
    for part in PARTS:
        if ratios.get(part) and part not in wanted:
            raise UserError(
                f"select_units: ratio has '{part}', parts {wanted} has not; add it to parts or leave parts out."
            )
        if part in wanted and part not in ratios:
            raise UserError(
                f"select_units: parts has '{part}', ratio {dict(ratios)} has not; give it a ratio, 0 for none."
            )


def _choose_per_layer(
    slots: Slots,
    free: Mapping[Slot, Sequence[int]],
    ratios: Mapping[str, float],
    scores: Scores | None,
    largest: bool,
    seed: int,
) -> dict[Slot, list[int]]:
    """Choose units of every container separately; a random choice depends on (seed, path, part) alone."""
    chosen = {}
    for slot, block in slots.items():
        path, part = slot
        count = max(1, round(ratios[part] * block.units))
        _check_enough(path, part, count, free[slot])
        if scores is None:
            chosen[slot] = random.Random(f"{seed}:{path}:{part}").sample(free[slot], count)
        else:
            chosen[slot] = _best([(float(scores[slot][unit]), unit) for unit in free[slot]], count, largest)
    return chosen


def _choose_global(
    slots: Slots,
    free: Mapping[Slot, Sequence[int]],
    ratios: Mapping[str, float],
    scores: Scores | None,
    largest: bool,
    seed: int,
) -> dict[Slot, list[int]]:
    """Choose units of all containers together: indices over (layer, unit), for v, o, u, d in turn from one random stream."""
    stream = random.Random(seed)
    chosen: dict[Slot, list[int]] = {slot: [] for slot in slots}
    for part in PARTS:
        part_slots = [slot for slot in slots if slot[1] == part]
        candidates = [(slot, unit) for slot in part_slots for unit in free[slot]]
        count = int(ratios.get(part, 0.0) * sum(slots[slot].units for slot in part_slots))
        _check_enough("the model", part, count, candidates)
        if scores is None:
            indices = stream.sample(range(len(candidates)), count)
        else:
            rated = [(float(scores[slot][unit]), index) for index, (slot, unit) in enumerate(candidates)]
            indices = _best(rated, count, largest)
        for slot, unit in (candidates[index] for index in indices):
            chosen[slot].append(unit)
    return chosen


def _check_enough(where: str, part: str, count: int, free: Sequence[Any]) -> None:
    """Raise UserError where fewer than `count` units are left."""
    if count > len(free):
        raise UserError(
            f"select_units: {count} units of '{part}' wanted of {where}, {len(free)} are left; lower ratio."
        )


def _best(rated: Sequence[tuple[float, int]], count: int, largest: bool) -> list[int]:
    """Return the indices of the `count` lowest or highest of (score, index); of equal scores the first."""
    sign = -1 if largest else 1
    return [index for _, index in sorted(rated, key=lambda entry: (sign * entry[0], entry[1]))[:count]]
