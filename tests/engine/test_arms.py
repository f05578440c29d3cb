"""What an arm takes from the base configuration."""

from __future__ import annotations

import pytest

from vismt.config.typed import build
from vismt.engine.study import resolve_arms
from vismt.jobs.classification.config import MultitaskConfig


def adapted(**arm: object) -> tuple[str, int, float | None]:
    """Return method, rank and alpha of an arm beside a base configuration of LoRA with rank 4 and alpha 9."""
    raw = {"adapt": {"method": "lora", "rank": 4, "alpha": 9.0}, "arms": {"arm": arm}}
    settings = resolve_arms(build(MultitaskConfig, raw, "made"))["arm"].adapt
    return settings.method, settings.rank, settings.alpha


def test_an_arm_does_not_inherit_what_its_method_does_not_read() -> None:
    assert adapted(**{"adapt.method": "s2ft"}) == ("s2ft", 8, None)
    assert adapted(**{"adapt.method": "pissa"}) == ("pissa", 4, 9.0)


@pytest.mark.parametrize("method", ["s2ft", "lisa"])
def test_what_an_arm_itself_gives_is_not_left_out(method: str) -> None:
    assert adapted(**{"adapt.method": method, "adapt.rank": 2}) == (method, 2, None)
