"""The train, validation and test parts of a study's data: named sets, or shares of the training sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from vismt.data.names import check_row_names, overlap
from vismt.errors import UserError


@dataclass
class PartsConfig:
    """The sets of each part. train, validation, test: cards as 'name' or 'name:split'; several are joined.

    validation_share, test_share: share of `train` that is split off where no set is named. limit: the largest number of
    training images, or rows of text, of what is left of `train`; it leaves the shares as they are.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test_share: float = 0.0
    validation_share: float = 0.0
    limit: int | None = None


def check_parts(parts: PartsConfig, where: str) -> None:
    """Raise UserError where nothing is named to test on, and where two parts have the same examples."""
    for part, share in (("test", parts.test_share), ("validation", parts.validation_share)):
        named = getattr(parts, part)
        if named and share:
            raise UserError(f"{where}: both {part} and {part}_share; give one of them.")
        if part == "test" and not named and not share:
            raise UserError(f"{where}: nothing to test on; name a set in test, or give test_share.")
    for part in ("test", "validation"):
        check_row_names(getattr(parts, part), f"{where}: {part}")
    for part, against in (("test", "train"), ("validation", "train"), ("validation", "test")):
        for name in getattr(parts, part):
            other = next((item for item in getattr(parts, against) if overlap(name, item)), None)
            if other is not None:
                fix = f"name another set or split, or take {part}_share instead"
                raise UserError(f"{where}: {part} '{name}' is in {against} '{other}', too; {fix}.")


def shares(parts: PartsConfig) -> dict[str, float]:
    """Return {part: share} for the parts that are split off the training sets."""
    return {
        part: share for part, share in (("test", parts.test_share), ("validation", parts.validation_share)) if share
    }
