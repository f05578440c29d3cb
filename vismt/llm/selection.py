"""Which units S2FT trains: a few heads and channels of each structure, at random or by a score (unit_scores.py).

S2FT, arXiv 2412.06289. The paper's text takes a few units of each block and compares these strategies; its code has the
random one alone, drawn over all layers together, so that many layers get none. budget='global' is that draw, in the code's
order (v, o, u, d from one stream); 'per_layer', the paper's, is the default here. Ties go to the lower unit.
Left out: the coupled choice for v and o, u and d, which the code does not have either.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vismt.errors import UserError, require_known
from vismt.llm.unit_scores import SCORES, Slots, unit_scores
from vismt.lowrank.inject import refuse_adapted
from vismt.lowrank.structures import PARTS, structures
from vismt.lowrank.targets import check_patterns, matches

STRATEGIES = ("random", *SCORES)
BUDGETS = ("per_layer", "global")


@dataclass(frozen=True)
class Selection:
    """units: {container: {part: units in ascending order}}; parts 'v' and 'o' count heads, 'u' and 'd' channels."""

    units: Mapping[str, Mapping[str, tuple[int, ...]]]

    def digest(self) -> str:
        """SHA-256 of the choice, the same wherever the choice is the same."""
        plain = {path: {part: list(units) for part, units in parts.items()} for path, parts in self.units.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def count(self, part: str) -> int:
        """Number of chosen units of one part in the whole model."""
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
    exclude: str | Selection | Sequence[str | Selection] = (),
) -> Selection:
    """Choose units of a stock model.

    parts: of 'v', 'o', 'u', 'd'; None means those that a mapping of ratios names, o and d for one ratio. Both given, a mapping
    has to have a ratio for each of them and none above 0 for another.
    ratio: share of the units, in (0, 1], one for all parts or {part: ratio} (0 for none). per_layer takes
    max(1, round(ratio n)) of the n units of each container, global int(ratio n) of all containers together. With grouped
    queries the units of 'v' are the key-value heads. largest: the highest scores instead of the lowest.
    calibration: for activation, product and gradient, a list of batches or one: a mapping of the model's arguments (an
    attention_mask leaves padding out), a tensor, or in a list (inputs, labels); gradient takes the output's .loss or the
    cross-entropy with the labels, of language models (labels (b, n), -100 for none) with the next token.
    exclude: earlier selections, none of whose units is taken again, and containers (full-path regex or suffix), from which
    none is taken and which count for no ratio.
    Raises UserError for a model without known structures, an unknown name, a wrong ratio, and too few units.
    """
    refuse_adapted(model)
    for name, given, known in (("strategy", [strategy], STRATEGIES), ("budget", [budget], BUDGETS)):
        require_known(f"select_units.{name}: no", given, known)
    ratios = _ratios(ratio, parts)
    given = [exclude] if isinstance(exclude, str | Selection) else list(exclude)
    earlier, patterns = (
        [one for one in given if isinstance(one, Selection)],
        [one for one in given if isinstance(one, str)],
    )
    found = structures(model)
    check_patterns("select_units.exclude", patterns, list(found))
    slots = {
        (path, part): structure.parts[part]
        for part in PARTS
        if ratios.get(part)
        for path, structure in found.items()
        if part in structure.parts and not any(matches(pattern, path) for pattern in patterns)
    }
    for part in [part for part, value in ratios.items() if value]:
        if not any(name == part for _, name in slots):
            reason = next((f": {one.without_v}" for one in found.values() if part == "v" and one.without_v), "")
            raise UserError(
                f"select_units: {type(model).__name__} has nothing known to take part '{part}' from{reason}."
            )
    free = {
        (path, part): [
            j for j in range(block.units) if not any(j in one.units.get(path, {}).get(part, ()) for one in earlier)
        ]
        for (path, part), block in slots.items()
    }
    scores = None if strategy == "random" else unit_scores(model, strategy, slots, calibration)
    chosen = (_each if budget == "per_layer" else _together)(slots, free, ratios, scores, largest, seed)
    units: dict[str, dict[str, tuple[int, ...]]] = {}
    for (path, part), taken in chosen.items():
        if taken:
            units.setdefault(path, {})[part] = tuple(sorted(taken))
    if not units:
        raise UserError(f"select_units: ratio {ratio} chooses nothing; raise it or take budget='per_layer'.")
    return Selection(units)


def _ratios(ratio: float | Mapping[str, float], parts: Sequence[str] | None) -> dict[str, float]:
    """{part: ratio} of every part wanted; a mapping and explicit parts have to agree, so that neither is cut silently."""
    wanted = [parts] if isinstance(parts, str) else None if parts is None else list(parts)
    require_known("select_units.parts: no", wanted or [], PARTS)
    given = (
        dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(("o", "d") if wanted is None else wanted, ratio)
    )
    require_known("select_units.ratio: no part", given, PARTS)
    for part, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"select_units.ratio: {value!r} for '{part}'; it must be a number from 0 to 1.")
    named = {part for part, value in given.items() if value}
    for part in PARTS if wanted is not None else ():
        if part in named and part not in wanted:
            raise UserError(
                f"select_units: ratio has '{part}', parts {wanted} has not; add it to parts or leave parts out."
            )
        if part in wanted and part not in given:
            raise UserError(f"select_units: parts has '{part}', ratio {given} has not; give it a ratio, 0 for none.")
    return {part: float(value) for part, value in given.items()}


def _each(
    slots: Slots, free: Mapping, ratios: Mapping[str, float], scores: Mapping | None, largest: bool, seed: int
) -> dict[tuple[str, str], list[int]]:
    """A choice for every container by itself; a random one depends on (seed, path, part) alone."""
    chosen = {}
    for slot, block in slots.items():
        count = max(1, round(ratios[slot[1]] * block.units))
        _need(slot[0], slot[1], count, free[slot])
        if scores is None:
            chosen[slot] = random.Random(f"{seed}:{slot[0]}:{slot[1]}").sample(free[slot], count)
        else:
            chosen[slot] = _best([(float(scores[slot][unit]), unit) for unit in free[slot]], count, largest)
    return chosen


def _together(
    slots: Slots, free: Mapping, ratios: Mapping[str, float], scores: Mapping | None, largest: bool, seed: int
) -> dict[tuple[str, str], list[int]]:
    """One choice for all containers: an index over (layer, unit), v, o, u, d in turn from one stream."""
    stream, chosen = random.Random(seed), {slot: [] for slot in slots}
    for part in PARTS:
        own = [slot for slot in slots if slot[1] == part]
        every = [(slot, unit) for slot in own for unit in free[slot]]
        count = int(ratios.get(part, 0.0) * sum(slots[slot].units for slot in own))
        _need("the model", part, count, every)
        if scores is None:
            taken = [every[place] for place in stream.sample(range(len(every)), count)]
        else:
            rated = [(float(scores[slot][unit]), place) for place, (slot, unit) in enumerate(every)]
            taken = [every[place] for place in _best(rated, count, largest)]
        for slot, unit in taken:
            chosen[slot].append(unit)
    return chosen


def _need(where: str, part: str, count: int, free: Sequence[Any]) -> None:
    if count > len(free):
        raise UserError(
            f"select_units: {count} units of '{part}' wanted of {where}, {len(free)} are left; lower ratio."
        )


def _best(rated: list[tuple[float, int]], count: int, largest: bool) -> list[int]:
    """Places of the `count` lowest or highest scores; of equal ones the first."""
    return [place for _, place in sorted(rated, key=lambda one: (-one[0] if largest else one[0], one[1]))[:count]]
