"""Targets, ranks, refusals: every message names the thing, what was seen and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.every_method import OPTIONS, small_vit
from helpers.tiny import holds, snapshot, tiny_vit
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.layers.base import adapter_layers
from vismt.methods import check_adaptation


def paths(targets: object, **options: object) -> list[str]:
    model = tiny_vit()
    vismt.adapt(model, "lora", targets, rank=2, **options)
    return list(adapter_layers(model))


def test_all_linear_leaves_the_head_and_convolutions_out() -> None:
    adapted = paths("all-linear")
    assert len(adapted) == 8 and "head" not in adapted and "patch_embed.proj" not in adapted
    assert paths(None) == adapted


def test_a_string_is_a_regex_over_the_full_path() -> None:
    assert paths(r"blocks\..*(qkv|fc1)") == [f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "mlp.fc1")]


def test_a_suffix_does_not_take_the_patch_embedding_along() -> None:
    assert paths(["proj"]) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert paths(["patch_embed.proj"]) == ["patch_embed.proj"]
    assert paths(["head"]) == ["head"]
    assert paths(["all-linear"][0:0] or ["qkv"], exclude=[r"blocks\.1\..*"]) == ["blocks.0.attn.qkv"]


@pytest.mark.parametrize(
    "targets,options,words",
    [
        (["attn.qvk"], {}, ["'attn.qvk'", "'attn.qkv' (2 modules)"]),
        ("attn.qvk", {}, ["'attn.qvk'", "'attn.qkv' (2 modules)"]),
        ("attn.qkv", {}, ["'attn.qkv'", "full path", "['attn.qkv']"]),
        ("blocks.[", {}, ["not a regular expression"]),
        (["qkv"], {"exclude": [".*"]}, ["nothing to adapt", "after exclude"]),
        (None, {"rank": 40}, ["rank", "40", "32", "rank_pattern", "clamp_rank"]),
        (None, {"rank": 0}, ["rank", "at least 1"]),
        (None, {"rank_pattern": {"attn.kqv": 4}}, ["rank_pattern", "'attn.kqv'", "'attn.qkv' (2 modules)"]),
        (None, {"also_train": ["haed"]}, ["also_train", "'haed'", "'head'"]),
        (None, {"dropout": 1.5}, ["dropout", "1.5"]),
        (None, {"dropout": "abc"}, ["dropout", "'abc'"]),
        (None, {"rank": 2.7}, ["rank", "2.7", "whole number"]),
        (None, {"alpha": 0}, ["alpha", "positive"]),
        (None, {"alpha": -1.0}, ["alpha", "positive"]),
        (None, {"rslora": "maybe"}, ["rslora", "'maybe'", "true or false"]),
        (None, {"rank_pattern": {"qkv": "abc"}}, ["rank_pattern['qkv']", "'abc'"]),
        (None, {"rank_pattern": [1]}, ["rank_pattern", "mapping"]),
        (None, {"alpha_pattern": {"qkv": -2}}, ["alpha_pattern['qkv']", "positive"]),
        (None, {"exclude": 5}, ["exclude", "5"]),
        (None, {"exclude": ["atn.qkv"]}, ["exclude", "'atn.qkv'", "'attn.qkv'"]),
        (None, {"also_train": [5]}, ["also_train", "[5]"]),
        (None, {"also_train": "attn.qkv"}, ["also_train", "is adapted"]),
        (None, {"dtype": "bfloat61"}, ["dtype", "'bfloat61'", "'bfloat16'"]),
        (None, {"dtype": torch.int8}, ["dtype", "floating"]),
        (5, {}, ["targets", "5"]),
    ],
)
def test_a_wrong_target_is_one_clear_line_and_changes_nothing(targets, options, words) -> None:
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(UserError) as error:
        vismt.adapt(model, "lora", targets, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == list(before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("corda", {"exclude": None}, "adapt.exclude: None; give a name or a list of names"),
        ("corda", {"targets": 5}, "adapt.targets: 5; give a name or a list of names"),
        ("corda", {"rank": 0}, "adapt.rank: 0; it must be a whole number"),
        ("s2ft", {"exclude": None}, "exclude: None; give a name or a list of names, or of UnitSelections"),
        ("s2ft", {"exclude": [3]}, r"exclude: \[3\]; give a name or a list of names"),
        ("s2ft", {"parts": 3}, "parts: 3; give a name or a list of names"),
        ("s2ft", {"selection": {"v": [0]}}, r"selection: \{'v': \[0\]\}; give what vismt.llm.select_units returns"),
        ("lisa", {"exclude": None}, "LISA.exclude: None; give a name or a list of names"),
        ("lisa", {"layers": 3}, "LISA.layers: 3; give a name or a list of names, or of Modules"),
        ("emtal", {"cluster": None}, r"cluster holds 0 entries \(NoneType\), needed labels"),
        ("mtlora", {"tasks": 5}, "tasks 5; give a name or a list of names"),
        ("mtlora", {"tasks": [1, 2]}, r"tasks \[1, 2\]; give a name or a list of names"),
        ("mtlora", {"tasks": "a", "task_blocks": 3}, "task_blocks 3; give a name or a list of names"),
        ("mtlora", {"tasks": "a", "task_blocks": "norm"}, "'norm' is a LayerNorm"),
        ("mtlora", {"tasks": "a", "task_scale": float("inf")}, "is inf; it must be a positive, finite number"),
        ("lora", {"rank": 10**400}, "adapt.rank: 1000"),
        ("lora", {"alpha": 10**400}, "adapt.alpha: 1000"),
        (["lora"], {}, "adapt: no method \"\\['lora'\\]\""),
    ],
)
def test_a_value_of_a_wrong_type_is_named(method: object, options: dict[str, object], words: str) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=words):
        vismt.adapt(model, method, **options)
    assert list(model.state_dict()) == list(tiny_vit().state_dict())


def test_unknown_method_and_option_name_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"'lroa'.*'lora'"):
        vismt.adapt(tiny_vit(), "lroa")
    with pytest.raises(UserError, match=r"'dropuot'.*'dropout'"):
        vismt.adapt(tiny_vit(), "lora", dropuot=0.1)
    with pytest.raises(UserError, match="solver 'svd'"):
        vismt.adapt(tiny_vit(), "pissa", solver="svd")
    with pytest.raises(UserError, match="dropout"):
        vismt.adapt(tiny_vit(), "pissa", dropout=0.1)
    with pytest.raises(UserError, match=r"the model is a NoneType; it must be a torch\.nn\.Module"):
        vismt.adapt(None, "lora")
    assert vismt.adapt(tiny_vit(), "pissa", rank=2, solver="randomized").method == "pissa"
    assert vismt.adapt(tiny_vit(), method="lora", rank=2).method == "lora"


def test_a_tied_parameter_has_the_first_of_its_names() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    model[2].weight = model[1].weight
    with pytest.raises(UserError, match=r"also_train: '2\.weight' is tied to '1\.weight'; name that one"):
        vismt.adapt(model, "lora", ["0"], rank=2, also_train=["2"])
    vismt.adapt(model, "lora", ["0"], rank=2, also_train=["1"])
    assert model[2].weight.requires_grad


def test_adapting_twice_is_refused() -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2)
    with pytest.raises(UserError, match="already carries 'lora'"):
        vismt.adapt(model, "pissa")
    with pytest.raises(UserError, match="merge: this model is not adapted"):
        vismt.merge(tiny_vit())


def test_models_of_peft_and_compiled_models_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"]))
    for wrapped in (model, model.base_model.model):
        before = snapshot(wrapped)
        with pytest.raises(UserError, match=r"belongs to peft; call merge_and_unload\(\) of the PeftModel first"):
            vismt.adapt(wrapped, "lora", ["qkv"], rank=2)
        assert holds(wrapped, before)
    vismt.adapt(model.merge_and_unload(), "lora", ["qkv"], rank=2)
    with pytest.raises(UserError, match=r"adapt: the model is compiled; adapt it before torch\.compile"):
        vismt.adapt(torch.compile(tiny_vit()), "lora", ["qkv"], rank=2)


def test_a_compiled_adapted_model_is_written_under_the_names_of_the_model(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", ["qkv"], rank=2)
    for write in (vismt.save_adapter, vismt.export_peft):
        write(model, tmp_path / "own"), write(torch.compile(model), tmp_path / "compiled")
    own, compiled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "compiled"))
    assert own.keys() == compiled.keys() and not any("_orig_mod" in name for name in own)
    vismt.load_adapter(tiny_vit(), tmp_path / "compiled")


def test_a_pruned_layer_is_not_merged() -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", ["qkv"], rank=2)
    prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    with pytest.raises(UserError, match=r"merge: 'blocks.0.attn.qkv' is pruned; call torch.nn.utils.prune.remove"):
        vismt.merge(model)


def test_clamped_rank_keeps_the_scale_of_its_own_rank() -> None:
    model = tiny_vit()
    report = vismt.adapt(model, "lora", ["head", "qkv"], rank=8, alpha=16, clamp_rank=True)
    ranks = {spec.path: (spec.settings.rank, spec.settings.scale) for spec in report.specs}
    # head is 5 x 32, so rank 5; alpha / r = 16 / 5. qkv keeps 8 and 16 / 8.
    assert ranks["head"] == (5, 3.2) and ranks["blocks.0.attn.qkv"] == (8, 2.0)


def test_patterns_set_rank_and_alpha_by_first_match() -> None:
    model = tiny_vit()
    report = vismt.adapt(
        model, "lora", rank=2, rank_pattern={r"blocks\.1\..*": 4, "fc2": 3}, alpha_pattern={"attn.qkv": 6}
    )
    ranks = {spec.path: (spec.settings.rank, spec.settings.scale) for spec in report.specs}
    assert ranks["blocks.0.mlp.fc2"] == (3, 1.0) and ranks["blocks.1.mlp.fc2"] == (4, 1.0)
    assert ranks["blocks.0.attn.qkv"] == (2, 3.0) and ranks["blocks.1.attn.qkv"] == (4, 1.5)


def test_refused_modules_are_named_or_left_out_with_a_reason() -> None:
    model = nn.ModuleDict(
        {"mha": nn.MultiheadAttention(8, 2), "ok": nn.Linear(8, 8), "grouped": nn.Conv2d(4, 4, 3, groups=2)}
    )
    report = vismt.adapt(model, "lora", rank=2, dropout=0.1)  # there is no input of the attention's weights to drop
    assert [spec.path for spec in report.specs] == ["ok"]
    assert any("MultiheadAttention" in text for text in report.skipped) and "left out" in str(report)

    class Own(nn.MultiheadAttention):
        def forward(self, *given, **options):
            return super().forward(*given, **options)

    with pytest.raises(UserError, match=r"lies inside nn\.MultiheadAttention"):
        vismt.adapt(nn.ModuleDict({"mha": Own(8, 2)}), "lora", ["out_proj"], rank=2)
    tied = nn.ModuleDict({"embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    tied["out"].weight = tied["embed"].weight
    with pytest.raises(UserError, match=r"shares its weight with 'embed\.weight'"):
        vismt.adapt(tied, "lora", ["out"], rank=2)
    frozen_int = nn.ModuleDict({"q": nn.Linear(4, 4)})
    frozen_int["q"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        vismt.adapt(frozen_int, "lora", ["q"], rank=2)


def test_a_module_with_its_own_computation_is_never_bypassed() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Gained(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.gain = nn.Parameter(torch.ones(1))

    model = nn.ModuleDict({"conv": Standardised(3, 4, 1), "gained": Gained(), "plain": nn.Linear(4, 4)})
    with pytest.raises(UserError, match=r"'conv' is a Standardised with another forward"):
        vismt.adapt(model, "lora", ["conv"], rank=1)
    report = vismt.adapt(model, "lora", rank=1)
    assert [spec.path for spec in report.specs] == ["plain"] and "Gained" in report.skipped[0]


def test_hooks_fire_while_adapted_and_after() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.ones(1, 4)
    model(x)
    vismt.adapt(model, "lora", rank=1)
    model(x)
    vismt.merge(model)
    model(x)
    assert len(calls) == 3
    handle.remove()
    model(x)
    assert len(calls) == 3


def test_a_part_that_is_adapted_blocks_the_whole() -> None:
    model = nn.Sequential(tiny_vit())
    vismt.adapt(model[0], "lora", rank=1)
    with pytest.raises(UserError, match=r"its part '0' already carries 'lora'"):
        vismt.adapt(model, "lora", rank=1)
    vismt.merge(model[0])
    vismt.adapt(model, "lora", rank=1)


def test_dtype_of_the_factors_by_name() -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2, dtype="float64", exclude="mlp.fc1")
    assert {layer.lora_A.dtype for layer in adapter_layers(model).values()} == {torch.float64}
    assert not any(path.endswith("fc1") for path in adapter_layers(model))


def test_report_prints_a_table_with_totals() -> None:
    model = tiny_vit()
    text = str(vismt.adapt(model, "lora", rank=2))
    # qkv r (d + 3 d) = 2 * 4 * 32 = 256 a block, two blocks
    assert "blocks.*.attn.qkv" in text and "512" in text and "96 x 32" in text
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,} trainable of {sum(p.numel() for p in model.parameters()):,}" in text


def test_conv_neighbour_values() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 2, padding=1, stride=2))
    vismt.adapt(model, "lora", ["0"], rank=1, alpha=2)
    layer = model[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        layer.lora_B.fill_(0.5)
    # scale 2 * B 0.5 = 1, so the update is the 2x2 kernel A itself: corner windows see one pixel, at kernel (1, 1) = 4, ...
    out = model(torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]))
    assert torch.equal(out, torch.tensor([[[[4.0, 30.0], [200.0, 1000.0]]]]))


def test_target_in_llama_and_the_head_left_out() -> None:
    from helpers.language_models import random_lm  # skips the test where transformers is missing

    model = random_lm("llama")
    tokens = torch.arange(5)[None]
    before = model(tokens).logits
    report = vismt.adapt(model, "pissa", rank=2)
    names = {spec.path.split(".")[-1] for spec in report.specs}
    assert (
        names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        and len(report.specs) == 14
    )
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_model_adapted_on_the_meta_device_gets_its_start_after_its_weights(method: str) -> None:
    expected = tiny_vit()
    vismt.adapt(expected, method, rank=2, split_qkv=True, seed=4)
    with torch.device("meta"):
        model = tiny_vit()
    vismt.adapt(model, method, rank=2, split_qkv=True, seed=4)
    with pytest.raises(UserError, match="fill_starts: the model lies on the meta device"):
        vismt.lowrank.fill_starts(model)
    model.to_empty(device="cpu")
    model.load_state_dict(tiny_vit().state_dict(), strict=False)
    vismt.lowrank.fill_starts(model)
    assert holds(model, expected.state_dict())
    with pytest.raises(UserError, match="fill_starts: the model was adapted with values"):
        vismt.lowrank.fill_starts(expected)


@pytest.mark.parametrize("method", ["emtal", "ilora", "mtlora", "corda", "s2ft"])
def test_starts_that_need_more_than_weights_are_refused_in_one_line(method: str) -> None:
    with torch.device("meta"):
        model = small_vit()
    vismt.adapt(model, method, **({} if method == "s2ft" else {"rank": 2}), **OPTIONS.get(method, {}))
    with pytest.raises(UserError, match=f"'{method}' .*; load the weights, then adapt"):
        model.to_empty(device="cpu")
        vismt.lowrank.fill_starts(model)


@pytest.mark.parametrize("method", ["s2ft", "lisa", "peft:ia3"])
@pytest.mark.parametrize("argument", [{"rank": 2}, {"rank": 64}, {"alpha": 4.0}])
def test_an_argument_that_the_method_does_not_read_is_an_error_that_names_what_to_set(method: str, argument) -> None:
    if method.startswith("peft:"):
        pytest.importorskip("peft")
    model, (name,) = tiny_vit(), argument
    message = rf"adapt.{name}: .* with '{method}', which .*: set .*, leave {name} out"
    with pytest.raises(UserError, match=message):
        vismt.adapt(model, method, **argument)
    with pytest.raises(UserError, match=message):  # of a configuration
        check_adaptation(model, method, None, argument.get("rank", 8), argument.get("alpha"), {})
    assert vismt.adapt(model, method, rank=8).trainable  # the default, which configurations pass
