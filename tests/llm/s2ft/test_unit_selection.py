"""The random choice of S2FT's units: seeds, parts, exclusion, structures, errors."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.tiny import tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import UnitSelection, select_units
from vismt.llm.s2ft.structures import UnitBlock, structures


class Ffn(nn.Module):
    """A gated FFN with the usual names of its projections."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.up_proj(x) * torch.sigmoid(self.gate_proj(x)))


class Attention(nn.Module):
    """Projections of 8 heads with the usual names; their output is irrelevant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 8
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(self.v_proj(x) + self.q_proj(x) * self.k_proj(x))


def stack(layers: int = 3, width: int = 16, hidden: int = 160) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(Attention(width), Ffn(width, hidden)) for _ in range(layers)))


def test_random_choice_follows_its_seed_and_nothing_else() -> None:
    model = stack()
    random.seed(1)
    selection = select_units(model, ratio=0.1, seed=4)
    random.seed(2)
    state = random.getstate(), torch.get_rng_state()
    assert (
        select_units(stack(), ratio=0.1, seed=4) == selection
        and selection.digest() == select_units(model, ratio=0.1, seed=4).digest()
    )
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert select_units(model, ratio=0.1, seed=5).digest() != selection.digest()
    # Fewer layers do not change the choice of the others; each layer is drawn separately.
    assert select_units(stack(2), ratio=0.1, seed=4).units["1.1"] == selection.units["1.1"] != selection.units["0.1"]
    assert {len(parts.get("o", (0,))) for parts in selection.units.values()} == {1}  # max(1, round(0.1 * 8))
    assert {len(parts["d"]) for parts in selection.units.values() if "d" in parts} == {16}
    assert selection.count("d") == 48 and selection.count("v") == 0


def test_the_parts_are_those_that_the_ratios_name() -> None:
    model = stack()

    def counts(**options: object) -> list[int]:
        return [select_units(model, **options).count(part) for part in ("v", "o", "u", "d")]

    assert counts(ratio=0.25) == [0, 6, 0, 120] and counts(ratio={"v": 0.5, "o": 0.25}) == [12, 6, 0, 0]
    assert counts(ratio={"u": 0.5}) == [0, 0, 240, 0] and counts(ratio={"u": 0.5, "o": 0}) == [0, 0, 240, 0]
    assert counts(ratio={"o": 0.25, "v": 0}, parts=["o"]) == [0, 6, 0, 0]
    assert counts(ratio={"o": 0.25, "v": 0}, parts=["o", "v"]) == [0, 6, 0, 0] and counts(ratio=0.5, parts="v") == [
        12,
        0,
        0,
        0,
    ]
    vit = tiny_vit()
    assert "v: 2 of 8 heads" in str(vismt.adapt(vit, "s2ft", ratio={"v": 0.25}))
    with pytest.raises(UserError, match=r"both selection and parts"):
        vismt.adapt(tiny_vit(), "s2ft", selection=UnitSelection({"blocks.0.attn": {"o": (1,)}}), parts=("o", "d"))


def test_earlier_selections_are_excluded() -> None:
    model = stack()
    first = select_units(model, ratio=0.3)
    second = select_units(model, ratio=0.3, exclude=first, seed=0)
    third = select_units(model, ratio=0.3, exclude=[first, second])
    for path in first.units:
        for part in first.units[path]:
            sets = [set(each.units.get(path, {}).get(part, ())) for each in (first, second, third)]
            assert sets[0] and not sets[0] & sets[1] and not (sets[0] | sets[1]) & sets[2]
    with pytest.raises(UserError, match=r"6 units of 'o' wanted of 0\.0, 4 are left"):
        select_units(model, ratio=0.75, exclude=select_units(model, ratio=0.5, parts="o"), parts="o")


def test_excluded_containers_give_nothing() -> None:
    chosen = select_units(stack(), ratio=0.25, exclude=r"[01]\..*")
    assert set(chosen.units) == {"2.0", "2.1"} and (chosen.count("o"), chosen.count("d")) == (2, 40)
    assert chosen.units == select_units(stack(), ratio=0.25, exclude=["0.0", "0.1", r"1\.[01]"]).units
    earlier = select_units(stack(), ratio=0.5, parts="d")
    mixed = select_units(stack(), ratio=0.5, parts="d", exclude=[r"0\..*", earlier])
    assert "0.1" not in mixed.units and not set(mixed.units["1.1"]["d"]) & set(earlier.units["1.1"]["d"])
    with pytest.raises(UserError, match=r"select_units\.exclude: no module matches 'layers\.7'"):
        select_units(stack(), exclude="layers.7")


def test_structures_of_known_layouts() -> None:
    layouts = structures(tiny_vit())
    assert list(layouts) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert layouts["blocks.0.attn"].parts["v"] == UnitBlock("blocks.0.attn.qkv", 0, 64, 4, 8)
    block = layouts["blocks.0.attn"].parts["v"]
    assert block.features([1]).tolist() == list(range(72, 80))
    assert structures(nn.Linear(3, 3)) == {}
    with pytest.raises(UserError, match="Linear has nothing known to take part 'o' from"):
        select_units(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "options,match",
    [
        ({"parts": ["q"]}, "select_units.parts: no 'q'"),
        ({"ratio": 1.5}, "select_units.ratio: 1.5 for 'o'"),
        ({"ratio": {"k": 0.1}}, "select_units.ratio: no part 'k'"),
        ({"ratio": 0.0}, "chooses nothing"),
        ({"ratio": {}}, "chooses nothing"),
        ({"parts": []}, "chooses nothing"),
        (
            {"ratio": {"v": 0.5, "o": 0.3}, "parts": ("o", "d")},
            r"ratio has 'v', parts \['o', 'd'\] has not; add it to parts or",
        ),
        ({"ratio": {"o": 0.3}, "parts": ("o", "d")}, r"parts has 'd', ratio \{'o': 0\.3\} has not; give it a ratio"),
    ],
)
def test_wrong_settings_are_named(options: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        select_units(tiny_vit(), **options)


def test_the_choice_goes_through_adapt() -> None:
    model = tiny_vit()
    report = vismt.adapt(model, "s2ft", ratio=0.25, seed=3)
    assert "o: 2 of 8 heads" in str(report) and report.total == sum(p.numel() for p in model.parameters())
    wanted = select_units(tiny_vit(), ratio=0.25, seed=3)
    assert isinstance(wanted, UnitSelection)
    assert model.blocks[0].mlp.fc2.slice_index.tolist() == list(wanted.units["blocks.0.mlp"]["d"])
    with pytest.raises(UserError, match="already carries 's2ft'"):
        select_units(model)
