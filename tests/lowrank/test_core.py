"""A core between the factors of a layer: golden numbers, blocks, derivatives, files, and unchanged layers without one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapter_folders import described, edit_text, write_description
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
from scripts.bench.accounting import saved_activation_bytes
from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import DESCRIPTION

THETAS = ["full", "diagonal"]


def single(**options: object) -> nn.Module:
    """One linear 5 -> 9 in fp64, adapted with rank 2 and moved."""
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(5, 9).double())
    vismt.adapt(model, "polar", rank=2, **options)
    return shake(model, 1.0)


def golden(theta: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    vismt.adapt(model, "polar", rank=2, alpha=6.0, theta=theta)  # scale 3
    layer = model[0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        layer.lora_C.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]) if theta == "full" else torch.tensor([2.0, -1.0]))
        layer.lora_B.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    return model


@pytest.mark.parametrize(
    "theta,output,merged",
    [
        # x = (3, 1): W x + b = (5.5, -1); A x = (2, 2). C A x = (2 + 4, -2) = (6, -2); B (6, -2) = (6, 4); times 3: (18, 12).
        # B C = [[1, 2], [1, 1]], B C A = [[1, 3], [1, 1]]. With C^T in its place C^T A x would be (2, 2).
        ("full", [[23.5, 11.0]], [[4.0, 11.0], [3.0, 2.0]]),
        # C A x = (4, -2); B (4, -2) = (4, 2); times 3: (12, 6). B C = [[2, 0], [2, -1]], B C A = [[2, -2], [2, -4]].
        ("diagonal", [[17.5, 5.0]], [[7.0, -4.0], [6.0, -13.0]]),
    ],
)
def test_golden_numbers(theta: str, output: list, merged: list) -> None:
    model = golden(theta)
    assert model(torch.tensor([[3.0, 1.0]])).tolist() == output
    assert model[0].low_rank().delta().tolist() == (torch.tensor(merged) - model[0].weight).tolist()
    assert vismt.merge(model)[0].weight.tolist() == merged


def test_each_block_has_its_core() -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(2, 6, bias=False))
    vismt.adapt(model, "polar", rank=1, split_qkv=True)
    layer = model.qkv
    assert layer.lora_C.shape == (3, 1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.lora_B.fill_(1.0)
        layer.lora_C.copy_(torch.tensor([[2.0], [3.0], [5.0]]))
    # q: 2 x0 = 6, k: 3 x1 = 15, v: 5 (x0 + x1) = 40
    assert model(torch.tensor([[3.0, 5.0]])).tolist() == [[6.0, 6.0, 15.0, 15.0, 40.0, 40.0]]
    assert layer.low_rank().delta().tolist() == [[2.0, 0], [2, 0], [0, 3], [0, 3], [5, 5], [5, 5]]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("theta", THETAS)
def test_forward_update_and_merge_agree_in_double_precision(split: bool, theta: str) -> None:
    model = single(alpha=3.0, split_qkv=split, theta=theta)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "qkv.lora_A",
        "qkv.lora_B",
        "qkv.lora_C",
    ]
    x = torch.randn(2, 3, 5, dtype=torch.double)
    layer, before = model.qkv, model(x)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(before - base, x @ layer.low_rank().delta().T, atol=1e-12)
    vismt.merge(model)
    assert torch.allclose(model(x), before, atol=1e-12)
    with pytest.raises(UserError, match="merge"):  # there is nothing left to merge twice
        vismt.merge(model)


@pytest.mark.parametrize("theta", THETAS)
def test_dropout_acts_on_the_update_alone(theta: str) -> None:
    model = single(dropout=0.5, theta=theta)
    x = torch.ones(4000, 5, dtype=torch.double)
    layer = model.qkv
    base = nn.functional.linear(x, layer.weight, layer.bias)
    full = model.eval()(x) - base
    noisy = model.train()(x) - base
    assert not torch.allclose(noisy, full)
    assert torch.allclose(noisy.mean(0), full.mean(0), atol=0.1 * float(full.detach().abs().max()))
    noisy.sum().backward()
    assert layer.lora_C.grad.abs().sum() > 0


def test_a_core_costs_no_tensor_as_long_as_the_tokens() -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    vismt.adapt(model, "polar", rank=4)
    x = torch.randn(1000, 64, requires_grad=True)
    # x (1000 x 64), x A^T (1000 x 4) and B C (128 x 4, made and once more by the concatenation of blocks), fp32
    assert saved_activation_bytes(model, lambda: model(x).sum()) <= 4 * (1000 * 64 + 1000 * 4 + 2 * 128 * 4)


@pytest.mark.parametrize("theta", THETAS)
def test_files_hold_the_core_and_refuse_what_does_not_fit(theta: str, tmp_path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "polar", rank=2, split_qkv=True, theta=theta, attraction=0.25, constraint="qr")
    vismt.save_adapter(shake(model), tmp_path / "a")
    loaded = vismt.load_adapter(tiny_vit(), tmp_path / "a")
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.vismt_record.options == {"dropout": 0.0, "seed": 0, "attraction": 0.25, "constraint": "qr"}
    original = described(tmp_path / "a")
    edit_text(tmp_path / "a", f'"core": "{theta}"', '"core": "round"')
    with pytest.raises(UserError, match=r"not what vismt.save_adapter writes: sites\[0\]: core 'round'"):
        vismt.load_adapter(tiny_vit(), tmp_path / "a")
    other_theta = "diagonal" if theta == "full" else "full"
    write_description(tmp_path / "a", original)
    edit_text(tmp_path / "a", f'"core": "{theta}"', f'"core": "{other_theta}"')
    with pytest.raises(UserError, match=r"lora_C: saved \(6,.*needed \(6,"):
        vismt.load_adapter(tiny_vit(), tmp_path / "a")
    write_description(tmp_path / "a", original)
    edit_text(tmp_path / "a", f', "core": "{theta}"', "")
    with pytest.raises(UserError, match=r"unexpected '.*lora_C'"):
        vismt.load_adapter(tiny_vit(), tmp_path / "a")


def test_a_layer_without_a_core_is_what_it_was(tmp_path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2)
    layer = model.blocks[0].attn.qkv
    assert layer.lora_C is None and layer.left() is layer.lora_B and set(layer.tensors()) == {"lora_A", "lora_B"}
    assert not [name for name in model.state_dict() if "lora_C" in name]
    vismt.save_adapter(model, tmp_path)
    assert all("core" not in spec for spec in json.loads((tmp_path / DESCRIPTION).read_text())["sites"])
    with pytest.raises(UserError, match="'lora' has no option 'core'"):
        vismt.adapt(tiny_vit(), "lora", core="full")
