"""Every method on the families of timm: what docs/methods/backbones.md says is what runs."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import backbones

QUICK = ("EVA-02", "ConvNeXt v2")  # a weight that is read without a call; convolutions, some in groups
# Two outputs, windows, stages of tokens, an attention with biases; then what other methods refuse. Others are like one of these.
SLOW = ("DeiT", "Swin", "Hiera", "LeViT", "CaiT", "CAFormer", "MLP-Mixer", "RegNet", "FastViT")
LINES = backbones.TABLE.search(backbones.PAGE.read_text(encoding="utf8"))[0].strip().splitlines()


def test_the_page_has_a_line_for_every_family() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in LINES[2:]] == list(backbones.FAMILIES)


def marked(family: str) -> Any:
    """Return a family as a parameter."""
    marks = [] if family in QUICK else pytest.mark.slow if family in SLOW else pytest.mark.campaign
    return pytest.param(family, marks=marks)


@pytest.mark.parametrize("family", [*map(marked, backbones.FAMILIES)])
def test_a_line_is_what_runs(family: str) -> None:
    assert backbones.row(family) in LINES
