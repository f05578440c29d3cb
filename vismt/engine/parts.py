"""The train, validation and test parts of a study's data: named sets, or shares of the training sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated

from vismt.base.errors import UserError
from vismt.config.sections import Count
from vismt.config.typed import within
from vismt.data.set_entries import check_apart, check_row_names, overlap

Share = Annotated[float, within(0, below=1)]


@dataclass
class PartsConfig:
    """The sets of each part.

    Args:
        train: Cards to train on, as "name" or "name:split". Several cards are joined.
        test: Cards to test on.
        validation: Cards to choose settings on.
        test_share: Share of `train` that is split off for the test if `test` is empty.
        validation_share: Share of `train` that is split off for validation if `validation` is empty.
        limit: Largest number of training images, or rows of text, from the rest of `train`, the same number of each class as far
            as it has so many. Images without a class count as one class. The limit does not change the shares. null for all.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test_share: Share = 0.0
    validation_share: Share = 0.0
    limit: Count | None = None


def check_parts(sections: Mapping[str, PartsConfig], calibration: Iterable[str] = ()) -> None:
    """Raise UserError if a section names nothing to test on, or if training, choosing and testing share examples.

    sections: Sections by key. A set of one section may not train, choose and test in another section. calibration: Sets that a
    method computes options from. They count as training sets.
    """
    for where, parts in sections.items():
        for part, share in (("test", parts.test_share), ("validation", parts.validation_share)):
            named = getattr(parts, part)
            if named and share:
                raise UserError(f"{where}: both {part} and {part}_share; give one of them.")
            if part == "test" and not named and not share:
                raise UserError(f"{where}: nothing to test on; name a set in test, or give test_share.")
            check_row_names(named, f"{where}: {part}")
    stages = [
        {f"{where}: {part}": getattr(parts, part) for where, parts in sections.items()}
        for part in ("train", "validation", "test")
    ]
    check_apart({**stages[0], "calibration.data": calibration}, *stages[1:])
    for (first, one), (second, other) in combinations(sections.items(), 2):
        shared = next((name for name in other.train if any(overlap(name, item) for item in one.train)), None)
        if shared is not None and shares(one) != shares(other):
            raise UserError(f"{second}: train '{shared}' is divided otherwise in {first}; give both the same shares.")


def shares(parts: PartsConfig) -> dict[str, float]:
    """Return {part: share} for the parts that are split off the training sets."""
    given = {"test": parts.test_share, "validation": parts.validation_share}
    return {part: share for part, share in given.items() if share}
