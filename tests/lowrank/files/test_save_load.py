"""Adapters on disk: strict, atomic, tied to their base; and the peft layout, read as strictly."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from helpers.adapter_folders import write_description
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files import save_load
from vismt.lowrank.layers.base import adapter_layers
from vismt.storage import files


@pytest.fixture
def saved(tmp_path):
    model = tiny_vit()
    vismt.adapt(model, "pissa", rank=2, also_train=["head"])
    shake(model)
    return model, vismt.save_adapter(model, tmp_path / "adapter")


def check_refused(folder, match: str, model: nn.Module | None = None) -> None:
    model = tiny_vit() if model is None else model
    before = snapshot(model)
    with pytest.raises(UserError, match=match):
        vismt.load_adapter(model, folder)
    assert holds(model, before)


def test_adapter_of_another_model_says_both_shapes(saved) -> None:
    _, folder = saved
    check_refused(
        folder, r"made for VisionTransformer.*lora_A: saved \(2, 32\), needed \(2, 64\)", tiny_vit(embed_dim=64)
    )
    check_refused(folder, r"no linear or convolution 'blocks\.1", tiny_vit(depth=1))


def test_another_base_is_refused_or_warned_of(saved) -> None:
    _, folder = saved
    check_refused(folder, r"weights [0-9a-f]{12}\), this is VisionTransformer \(weights", tiny_vit(seed=9))
    other = tiny_vit(seed=9)
    with pytest.warns(UserWarning, match="was made for"):
        vismt.load_adapter(other, folder, on_other_base="warn")
    # A cast of the same checkpoint is the same base.
    vismt.load_adapter(tiny_vit().to(torch.bfloat16), folder)
    vismt.load_adapter(tiny_vit().to(torch.float16), folder)


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_loading_over_another_adapter_is_refused(saved, method) -> None:
    _, folder = saved
    model = tiny_vit()
    vismt.adapt(model, method, rank=2)
    check_refused(folder, f"already carries another '{method}'", model)


def test_a_file_without_a_start_leaves_none_of_another_adapter(tmp_path) -> None:
    plain, started = tiny_vit(), tiny_vit()
    for model in (plain, started):
        vismt.adapt(model, "lora", rank=2)
        shake(model, seed=1)
    vismt.save_adapter(plain, tmp_path)
    for layer in adapter_layers(started).values():
        layer.lora_A0, layer.lora_B0 = torch.rand_like(layer.lora_A), torch.rand_like(layer.lora_B)
    assert not torch.allclose(started(images()), plain(images()), atol=1e-3)
    assert torch.equal(vismt.load_adapter(started, tmp_path)(images()), plain(images()))


def test_damaged_foreign_and_missing_files(saved, tmp_path) -> None:
    model, folder = saved
    check_refused(tmp_path / "nowhere", "no file")
    path = folder / save_load.DESCRIPTION
    description = json.loads(path.read_text())
    file = folder / description["tensors"]
    good = file.read_bytes()
    file.write_bytes(good[:100])
    check_refused(folder, "damaged")
    shake(model)
    other = vismt.save_adapter(model, tmp_path / "other")
    file.write_bytes(next(other.glob("*.safetensors")).read_bytes())
    check_refused(folder, "is not the file that")
    for wrong in ("{}", "5", '{"format": 1, "sites": [{}]}', json.dumps({**description, "options": 5})):
        path.write_text(wrong)
        check_refused(folder, "is not what vismt.save_adapter writes")
    write_description(folder, {**description, "tensors": "../other/adapter-000000000000.safetensors"})
    check_refused(folder, "is not what vismt.save_adapter writes")
    path.write_text("{")
    check_refused(folder, "JSON")
    path.write_text(json.dumps({**description, "format": 99}))
    check_refused(folder, "format 99")


def test_a_save_that_is_cut_short_leaves_the_one_before(saved, monkeypatch) -> None:
    model, folder = saved
    before = model(images())
    shake(model)
    write = files.atomic_write

    def cut(path, data) -> None:
        if path.name == save_load.DESCRIPTION:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(save_load, "atomic_write", cut)
    with pytest.raises(KeyboardInterrupt):
        vismt.save_adapter(model, folder)
    assert torch.equal(vismt.load_adapter(tiny_vit(), folder)(images()), before)
    monkeypatch.setattr(save_load, "atomic_write", write)
    vismt.save_adapter(model, folder)
    assert len(list(folder.glob("*.safetensors"))) == 1


# A router needs the FFNs of a ViT, MTLoRA its blocks, LISA layers, S2FT heads or channels, CorDA covariances, iLoRA gates and a
# rank that its experts share; the others take any linear.
ANYWHERE = [
    method for method in vismt.list_methods() if method not in ("emtal", "mtlora", "lisa", "s2ft", "corda", "ilora")
]
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=SHAPES,
    alpha=st.floats(0.1, 40),
    rslora=st.booleans(),
    method=st.sampled_from(ANYWHERE),
    seed=st.integers(0, 99),
    conv=st.booleans(),
)
def test_merge_unadapt_save_load_for_any_shape(tmp_path, shape, alpha, rslora, method, seed, conv) -> None:
    out_features, in_features, rank = shape
    torch.manual_seed(seed)
    layer = nn.Conv2d(in_features, out_features, 1) if conv else nn.Linear(in_features, out_features)
    stock = nn.ModuleDict({"layer": layer.double()})
    x = torch.randn(2, in_features, 1, 1).double() if conv else torch.randn(2, in_features).double()
    weight = stock["layer"].weight.detach().clone()
    vismt.adapt(stock, method, ["layer"], rank=rank, alpha=alpha, rslora=rslora, clamp_rank=True, seed=seed)
    start = stock["layer"](x)
    assert torch.allclose(start, layer(x), atol=1e-10)
    shake(stock)
    moved = stock["layer"](x)
    vismt.save_adapter(stock, tmp_path / "a")
    again = nn.ModuleDict({"layer": layer})
    vismt.load_adapter(again, tmp_path / "a")
    assert torch.equal(again["layer"](x), moved)
    vismt.merge(again)
    assert torch.allclose(again["layer"](x), moved, rtol=1e-12, atol=1e-12)
    vismt.unadapt(stock)
    assert torch.equal(stock["layer"].weight, weight) and type(stock["layer"]) is type(layer)


# ---- the peft layout ---------------------------------------------------------------------------------------------------


def peft_folder(tmp_path, **options: object):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["qkv", "fc1"], init_lora_weights=False, **options)
    model = peft.get_peft_model(tiny_vit(), config).eval()
    model.save_pretrained(str(tmp_path / "peft"))
    return model, tmp_path / "peft"


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 1}}]
)
def test_what_peft_wrote_is_read_to_the_same_logits(tmp_path, options) -> None:
    theirs, folder = peft_folder(tmp_path, **options)
    ours = vismt.import_peft(tiny_vit(), folder)
    assert torch.allclose(ours(images()), theirs(images()), atol=1e-6)
    assert not torch.allclose(ours(images()), tiny_vit()(images()), atol=1e-3)


def test_a_trained_head_goes_both_ways(tmp_path) -> None:
    theirs, folder = peft_folder(tmp_path, modules_to_save=["head"])
    with torch.no_grad():
        for parameter in theirs.base_model.model.head.modules_to_save.default.parameters():
            parameter.add_(0.3)
    theirs.save_pretrained(str(folder))
    ours = vismt.import_peft(tiny_vit(), folder)
    assert torch.allclose(ours(images()), theirs(images()), atol=1e-6)
    assert set(ours.vismt_record.also_train) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    "change,match",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"r": None}, "cannot be read"),
        ({"rank_pattern": [3]}, "cannot be read"),
        ({"r": 5}, r"saved \(2, 32\), needed \(5, 32\)"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, change, match) -> None:
    _, folder = peft_folder(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=match):
        vismt.import_peft(tiny_vit(), folder)


def test_peft_only_warns_where_we_refuse(tmp_path) -> None:
    _, folder = peft_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = next(iter(tensors))
    for change, match in (
        ({key.removeprefix("base_model.model."): tensors[key].clone()}, "lacks the prefix"),
        ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": None}, "not its partner"),
        ({f"base_model.model.nobody.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, "'nobody'"),
    ):
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        safetensors.torch.save_file(changed, path)
        with pytest.raises(UserError, match=match):
            vismt.import_peft(tiny_vit(), folder)


def test_half_a_module_cannot_be_exported(tmp_path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2, also_train=["head.bias"])
    with pytest.raises(UserError, match=r"'head\.bias' is trained without the rest"):
        vismt.export_peft(model, tmp_path)


@pytest.mark.parametrize("method", ANYWHERE)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_go_to_peft_and_back(tmp_path, method, family) -> None:
    from helpers.language_models import random_lm  # skips the test where transformers is missing

    peft = pytest.importorskip("peft")
    tokens = torch.arange(6)[None]
    model = random_lm(family)
    vismt.adapt(model, method, rank=2, alpha=5, rank_pattern={"mlp.c_proj" if family == "gpt2" else "v_proj": 3})
    shake(model)
    expected = model(tokens).logits
    vismt.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(random_lm(family), str(tmp_path)).eval()
    assert torch.allclose(theirs(tokens).logits, expected, atol=1e-5)
    ours = vismt.import_peft(random_lm(family), tmp_path)
    assert torch.allclose(ours(tokens).logits, expected, atol=1e-5)
    stock = random_lm(family)
    assert not torch.allclose(stock(tokens).logits, expected, atol=1e-3)
    vismt.merge(model)
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.allclose(stock(tokens).logits, expected, atol=1e-5)
