"""Adapters on disk: strict, atomic, tied to their base."""

from __future__ import annotations

import json

import pytest
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
from vismt.methods import METHODS
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


# A router needs the FFNs of a ViT, MTLoRA its blocks, S2FT heads or channels, CorDA covariances, iLoRA gates and a rank that its
# experts share; the others with layers take any linear.
ANYWHERE = [
    name
    for name, method in METHODS.items()
    if method.layers and name not in ("emtal", "mtlora", "s2ft", "corda", "ilora")
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
