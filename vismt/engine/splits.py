"""The parts of what a study trains, validates and tests on: named sets, or shares of the training sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from vismt.errors import UserError


@dataclass
class PartsConfig:
    """train, validation, test: cards as 'name' or 'name:split', several are joined.

    validation_share, test_share: the share of `train` that is kept apart where no set is named. limit: the largest number of
    training images, or rows of text.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test_share: float = 0.0
    validation_share: float = 0.0
    limit: int | None = None


def check_parts(parts: PartsConfig, where: str) -> None:
    """Something to test on is named, and no two parts name the same examples."""
    for part, share in (("test", parts.test_share), ("validation", parts.validation_share)):
        named = getattr(parts, part)
        if named and share:
            raise UserError(f"{where}: both {part} and {part}_share; give one of them.")
        if part == "test" and not named and not share:
            raise UserError(f"{where}: nothing to test on; name a set in test, or give test_share.")
    for part, against in (("test", "train"), ("validation", "train"), ("validation", "test")):
        for name in getattr(parts, part):
            other = next((one for one in getattr(parts, against) if _overlap(name, one)), None)
            if other is not None:
                fix = f"name another set or split, or take {part}_share instead"
                raise UserError(f"{where}: {part} '{name}' is in {against} '{other}', too; {fix}.")


def _overlap(one: str, other: str) -> bool:
    """Whether two sets, 'card' or 'card:split', have examples in common."""
    (card, _, split), (same, _, against) = one.partition(":"), other.partition(":")
    return card == same and (split == against or bool({"", "all"} & {split, against}))


def shares(parts: PartsConfig) -> dict[str, float]:
    """{part: share} of what is kept apart from the training sets."""
    return {
        part: share for part, share in (("test", parts.test_share), ("validation", parts.validation_share)) if share
    }
