"""The selection of S2FT's units: the released draw, strategies on a constructed model, budgets, exclusion, orders."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.language_models import MODELS, tokens
from helpers.tiny import images, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import UnitSelection, select_units
from vismt.llm.s2ft.structures import Structure, UnitBlock, structures


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


def test_global_random_choice_is_the_released_draw() -> None:
    """Numbers of the released code: seed 0, three layers, 8 heads at 0.26 and 160 channels at 0.02."""
    chosen = select_units(stack(), ratio={"o": 0.26, "d": 0.02}, budget="global", seed=0).units
    heads = [(layer, unit) for layer in range(3) for unit in chosen.get(f"{layer}.0", {}).get("o", ())]
    channels = [(layer, unit) for layer in range(3) for unit in chosen.get(f"{layer}.1", {}).get("d", ())]
    assert heads == [(0, 1), (1, 0), (1, 4), (1, 5), (1, 7), (2, 0)]
    assert channels == [(0, 155), (1, 23), (1, 47), (1, 84), (1, 138), (2, 81), (2, 104), (2, 136), (2, 150)]


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
    third = select_units(model, ratio=0.3, exclude=[first, second], budget="global")
    for path in first.units:
        for part in first.units[path]:
            sets = [set(each.units.get(path, {}).get(part, ())) for each in (first, second, third)]
            assert sets[0] and not sets[0] & sets[1] and not (sets[0] | sets[1]) & sets[2]
    with pytest.raises(UserError, match=r"6 units of 'o' wanted of 0\.0, 4 are left"):
        select_units(model, ratio=0.75, exclude=select_units(model, ratio=0.5, parts="o"), parts="o")


@pytest.mark.parametrize("budget", ["per_layer", "global"])
def test_excluded_containers_give_nothing_and_count_for_no_ratio(budget: str) -> None:
    chosen = select_units(stack(), ratio=0.25, budget=budget, exclude=r"[01]\..*")
    assert set(chosen.units) == {"2.0", "2.1"} and (chosen.count("o"), chosen.count("d")) == (2, 40)
    assert chosen.units == select_units(stack(), ratio=0.25, budget=budget, exclude=["0.0", "0.1", r"1\.[01]"]).units
    earlier = select_units(stack(), ratio=0.5, parts="d")
    mixed = select_units(stack(), ratio=0.5, parts="d", budget=budget, exclude=[r"0\..*", earlier])
    assert "0.1" not in mixed.units and not set(mixed.units["1.1"]["d"]) & set(earlier.units["1.1"]["d"])
    with pytest.raises(UserError, match=r"select_units\.exclude: no module matches 'layers\.7'"):
        select_units(stack(), exclude="layers.7")


@pytest.mark.parametrize("part,loud", [("d", "down"), ("u", "up")])
def test_weight_scores_look_at_the_matrix_that_is_trained(part: str, loud: str) -> None:
    model = stack(1)
    with torch.no_grad():
        model[0][1].down_proj.weight[:, 33] *= 100
        model[0][1].up_proj.weight[44] *= 100
    taken = select_units(model, "weight", 0.006, parts=part, largest=True).units["0.1"][part]
    assert taken == ((33,) if loud == "down" else (44,))
    assert not {33, 44} & set(select_units(model, "weight", 0.5, parts=part).units["0.1"][part]) - {
        33 if part == "u" else 44
    }


def test_activation_product_and_gradient_scores_are_what_they_say() -> None:
    model = stack(1)
    with torch.no_grad():
        model[0][1].up_proj.weight[7] *= 100  # large input of down
        model[0][1].down_proj.weight[:, 9] *= 1e4  # large column of down
        model[0][1].down_proj.weight[:, 7] *= 1e-9  # so that weight times activation is small
    x, labels = torch.randn(6, 5, 16), torch.randint(16, (6,))

    def best(strategy: str, calibration: list, **options: object) -> tuple[int, ...]:
        return select_units(model, strategy, 0.006, parts="d", calibration=calibration, **options).units["0.1"]["d"]

    assert best("activation", [x[:3], x[3:]], largest=True) == (7,)
    assert best("product", [x], largest=True) == (9,) and best("product", [x]) == (7,)
    flat = [(x.mean(1), labels)]
    assert best("gradient", flat, largest=True) == (7,)  # dL/dW[:, j] grows with input j only
    # All scores by hand on the same batch.
    ffn, inner = model[0][1], x.mean(1)
    z = {}
    handle = ffn.down_proj.register_forward_pre_hook(lambda module, args: z.update(kept=args[0]))
    loss = nn.functional.cross_entropy(model(inner), labels)
    handle.remove()
    grad = torch.autograd.grad(loss, ffn.down_proj.weight)[0]
    for strategy, score in (
        ("activation", z["kept"].abs().mean(0)),
        ("gradient", grad.norm(dim=0)),
        ("product", z["kept"].abs().mean(0) * ffn.down_proj.weight.norm(dim=0)),
    ):
        wanted = sorted(score.argsort()[:16].tolist())
        taken = select_units(model, strategy, 0.1, parts="d", calibration=flat).units["0.1"]["d"]
        assert list(taken) == wanted, strategy
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training
    with pytest.raises(UserError, match="'gradient' needs a loss"):
        best("gradient", [{"input": inner}])


def test_padding_is_left_out_of_activations() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Masked(Ffn(16, 40)), torch.randn(2, 4, 16)
    x[:, 3] = 1000 * torch.randn(16)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    padded = [{"x": x, "attention_mask": mask}]
    plain = [{"x": x[:, :3], "attention_mask": mask[:, :3]}]
    of = [select_units(model, "activation", 0.3, parts="d", calibration=batches) for batches in (padded, plain)]
    assert of[0] == of[1]
    assert of[0] != select_units(
        model, "activation", 0.3, parts="d", calibration=[{"x": x, "attention_mask": torch.ones_like(mask)}]
    )


def scored(strategy: str, calibration: object, name: str = "llama-gqa") -> UnitSelection:
    return select_units(MODELS[name](), strategy, 0.3, calibration=calibration)


@pytest.mark.parametrize("strategy", ["activation", "product"])
def test_a_mapping_or_a_tensor_alone_is_one_batch(strategy: str) -> None:
    ids = tokens(4, 7)
    expected = scored(strategy, [ids])
    assert (
        scored(strategy, ids)
        == scored(strategy, {"input_ids": ids})
        == scored(strategy, [{"input_ids": ids}])
        == expected
    )
    assert scored(strategy, [ids[:2], ids[2:]]) == expected != scored(strategy, [ids[:1]])
    vit = [
        select_units(tiny_vit(), strategy, 0.3, calibration=batches)
        for batches in (images(4), [images(4)], iter([images(4)]))
    ]
    assert vit[0] == vit[1] == vit[2]


def test_gradient_scores_of_a_language_model_are_those_of_the_next_token() -> None:
    """(inputs, labels) give the loss of the model with labels, which shifts them; -100 is ignored."""
    ids, full = tokens(3, 7), MODELS["llama-gqa"]()
    labels = ids.masked_fill(torch.arange(7)[None] < 3, -100)
    full(input_ids=ids, labels=labels).loss.backward()
    chosen = scored("gradient", [(ids, labels)])
    for path, parts in chosen.units.items():
        for part, units in parts.items():
            block = structures(MODELS["llama-gqa"]())[path].parts[part]
            grad = full.get_submodule(block.path).weight.grad
            norms = torch.stack(
                [grad.index_select(block.dim, block.features([unit])).norm() for unit in range(block.units)]
            )
            assert sorted(norms.argsort()[: len(units)].tolist()) == list(units), (path, part)
    assert scored("gradient", {"input_ids": ids, "labels": labels}) == chosen != scored("gradient", [(ids, ids)])
    assert scored("gradient", [(ids[:, :6], labels[:, :6]), (ids, labels)]) != chosen


@pytest.mark.parametrize(
    "strategy,calibration,match",
    [
        ("activation", {"input_ids": tokens(), "attention_mask": torch.zeros(2, 8)}, "no token of calibration is left"),
        ("product", [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 8)}], "no token of calibration is left"),
        (
            "gradient",
            [(tokens(), tokens()), (tokens(), torch.full((2, 8), -100))],
            "calibration batch 1 is nan: every label is",
        ),
        (
            "gradient",
            [{"input_ids": tokens(), "labels": torch.full((2, 8), -100)}],
            "calibration batch 0 is nan: every label",
        ),
        ("gradient", [(tokens(), tokens()[:, 1:])], r"labels \(2, 7\) for logits \(2, 8, 40\); .* the tokens \(b, n\)"),
        ("gradient", tokens(), "needs a loss: give labels"),
        ("gradient", {"input_ids": tokens()}, "needs a loss"),
        ("activation", [3], r"calibration batch 0 is of type int; give a mapping"),
        ("gradient", [(tokens(),)], "calibration batch 0 is of type tuple"),
    ],
)
def test_calibration_that_says_nothing_is_named(strategy: str, calibration: object, match: str) -> None:
    with pytest.raises(UserError, match=match):
        scored(strategy, calibration)


def test_classes_that_do_not_fit_the_logits_are_named() -> None:
    match = r"labels \(3, 2\) for logits \(3, 5\); 'gradient' needs the classes \(b,\)"
    with pytest.raises(UserError, match=match):
        select_units(tiny_vit(), "gradient", calibration=[(images(3), torch.zeros(3, 2))])
    shares = select_units(tiny_vit(), "gradient", 0.3, calibration=[(images(3), torch.eye(5)[:3])])
    assert shares == select_units(tiny_vit(), "gradient", 0.3, calibration=[(images(3), torch.arange(3))])


def test_ties_go_to_the_lower_unit_and_global_scores_compare_layers() -> None:
    model = stack(2)
    with torch.no_grad():
        for layer in model:
            layer[1].down_proj.weight.fill_(1.0)
        model[1][1].down_proj.weight.mul_(2)
    assert select_units(model, "weight", 0.02, parts="d").units["0.1"]["d"] == (0, 1, 2)
    assert select_units(model, "weight", 0.02, parts="d", budget="global", largest=True).units == {
        "1.1": {"d": tuple(range(6))}
    }


def test_orders_are_those_of_the_released_code_and_keep_groups() -> None:
    def structure(units: int, groups: int, parts: str) -> Structure:
        return Structure("", units, groups, (), {part: UnitBlock("", 0, 0, units, 1) for part in parts})

    # V = {1, 5}, O = {5, 3} -> 1, 5, 3, rest: V trains heads 0..1 and O 1..2 of the new order.
    assert structure(8, 8, "vo").order({"v": (1, 5), "o": (3, 5)}) == [1, 5, 3, 0, 2, 4, 6, 7]
    assert structure(8, 8, "ud").order({"u": (0, 4), "d": (2, 4)}) == [0, 4, 2, 1, 3, 5, 6, 7]
    # Groups of four move as blocks, and heads within them; split groups are adjacent, whole groups lie between.
    assert structure(8, 2, "vo").order({"o": (1, 6)}) == [0, 2, 3, 1, 6, 4, 5, 7]
    assert structure(6, 3, "vo").order({"o": (0, 2, 3, 5)}) == [1, 0, 2, 3, 5, 4]
    for seed in range(40):
        stream = random.Random(seed)
        chosen = {
            "v": stream.sample(range(4), stream.randint(0, 2)),
            "o": stream.sample(range(12), stream.randint(0, 5)),
        }
        order = structure(12, 4, "vo").order(chosen)
        assert sorted(order) == list(range(12))
        assert all(len({unit // 3 for unit in order[start : start + 3]}) == 1 for start in range(0, 12, 3))
        groups = [order[start] // 3 for start in range(0, 12, 3)]
        assert sorted(groups[: len(chosen["v"])]) == sorted(chosen["v"])


def test_structures_of_known_layouts() -> None:
    layouts = structures(tiny_vit())
    assert list(layouts) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert layouts["blocks.0.attn"].parts["v"] == UnitBlock("blocks.0.attn.qkv", 0, 64, 4, 8)
    block = layouts["blocks.0.attn"].parts["v"]
    assert block.features([1]).tolist() == list(range(72, 80)) and block.units_of(block.features([3, 1])) == [1, 3]
    assert structures(nn.Linear(3, 3)) == {}
    with pytest.raises(UserError, match="Linear has nothing known to take part 'o' from"):
        select_units(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "options,match",
    [
        ({"strategy": "randm"}, "select_units.strategy: no 'randm'.*'random'"),
        ({"budget": "all"}, "select_units.budget"),
        ({"parts": ["q"]}, "select_units.parts: no 'q'"),
        ({"ratio": 1.5}, "select_units.ratio: 1.5 for 'o'"),
        ({"ratio": {"k": 0.1}}, "select_units.ratio: no part 'k'"),
        ({"strategy": "activation"}, "needs calibration"),
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


def test_calibrated_options_go_through_adapt_and_a_vit() -> None:
    model = tiny_vit()
    batches = [(images(3), torch.tensor([0, 1, 2]))]
    report = vismt.adapt(model, "s2ft", strategy="gradient", ratio=0.25, calibration=batches, largest=True)
    assert "o: 2 of 8 heads" in str(report) and report.total == sum(p.numel() for p in tiny_vit().parameters())
    wanted = select_units(tiny_vit(), "gradient", 0.25, largest=True, calibration=batches)
    features = sorted(model.blocks[0].mlp.fc2.slice_index.tolist())
    assert isinstance(wanted, UnitSelection) and features == list(wanted.units["blocks.0.mlp"]["d"])
    with pytest.raises(UserError, match="already carries 's2ft'"):
        select_units(model)
