"""What an arm takes from the base configuration."""

from __future__ import annotations

import pytest

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.engine.study import ignored, resolve_arms
from vismt.jobs.multitask.config import MultitaskConfig


def adapted(**arm: object) -> tuple[str, int, float | None]:
    """Return method, rank and alpha of an arm beside a base configuration of LoRA with rank 4 and alpha 9."""
    raw = {"adapt": {"method": "lora", "rank": 4, "alpha": 9.0}, "arms": {"arm": arm}}
    settings = resolve_arms(build(MultitaskConfig, raw, "made"))["arm"].adapt
    return settings.method, settings.rank, settings.alpha


def test_an_arm_does_not_inherit_what_its_method_does_not_read() -> None:
    assert adapted(**{"adapt.method": "s2ft"}) == ("s2ft", 8, None)
    assert adapted(**{"adapt.method": "pissa"}) == ("pissa", 4, 9.0)


@pytest.mark.parametrize("method", ["s2ft", "lisa", "full", "head"])
@pytest.mark.parametrize("arm", [{"adapt.rank": 2}, {"adapt": {"rank": 2}}])
def test_what_an_arm_itself_gives_is_not_left_out(method: str, arm: dict) -> None:
    changes = {**arm, "adapt.method": method} if "adapt.rank" in arm else {"adapt": {**arm["adapt"], "method": method}}
    with pytest.raises(UserError, match=rf"arms.arm: adapt.rank: 2 with '{method}', which .*, leave rank out"):
        adapted(**changes)


def test_the_method_of_a_configuration_is_changed_alone() -> None:
    raw = {"adapt": {"method": "s2ft", "rank": 4, "alpha": 9.0}}
    (arm,) = resolve_arms(build(MultitaskConfig, raw, "made")).values()
    assert (arm.adapt.rank, arm.adapt.alpha) == (8, None)
    (line,) = ignored(build(MultitaskConfig, raw, "made"))
    assert line.startswith("adapted   without rank 4, alpha 9.0: 's2ft' takes units")
    arms = {"a": {"adapt.method": "lora"}, "b": {"adapt.method": "lisa"}, "c": {"adapt": None}, "d": {"adapt.rank": 8}}
    lines = ignored(build(MultitaskConfig, {**raw, "arms": arms}, "made"))
    assert [line.split("   ")[:2] for line in lines] == [
        ["b", "without rank 4, alpha 9.0: 'lisa' trains whole layers: set layers, active and exclude"],
        ["d", "without alpha 9.0: 's2ft' takes units: set parts and ratio"],
    ]


def test_a_method_that_trains_a_head_alone_is_none() -> None:
    """A job has heads of its own, and what it does without an adapter holds for such an arm: stored features, one rate."""
    base = {"adapt": {"method": "head", "rank": 4}}
    assert [arm.adapt for arm in resolve_arms(build(MultitaskConfig, base, "made")).values()] == [None]
    arms = {"head": {"adapt.method": "head"}, "none": {"adapt": None}, "lora": {"adapt.method": "lora"}}
    resolved = resolve_arms(build(MultitaskConfig, {**base, "arms": arms}, "made"))
    assert resolved["head"] == resolved["none"] and resolved["lora"].adapt.rank == 4
