"""Every method on the families of timm: what docs/methods/backbones.md says is what runs."""

from __future__ import annotations

import pytest

from scripts import backbones

QUICK = ("EVA-02", "ConvNeXt v2")  # a weight that is read without a call; convolutions, some in groups
LINES = backbones.TABLE.search(backbones.PAGE.read_text(encoding="utf8"))[0].strip().splitlines()


def test_the_page_has_a_line_for_every_family() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in LINES[2:]] == list(backbones.FAMILIES)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in backbones.FAMILIES]
)
def test_a_line_is_what_runs(family: str) -> None:
    assert backbones.row(family) in LINES
