"""The fused layer: golden numbers, derivatives of first and second order, dropout, dtype rules, saved tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vismt
from scripts.bench.accounting import saved_activation_bytes
from vismt.lowrank.layers import fused
from vismt.lowrank.layers.base import adapter_layers


def single(
    method: str = "lora", in_features: int = 5, out_features: int = 9, name: str = "qkv", **options: object
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(in_features, out_features).double())
    vismt.adapt(model, method, rank=2, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def test_golden_number_of_one_linear() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    vismt.adapt(model, "lora", rank=1, alpha=3.0)
    layer = model[0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [4.0]]))
    # x = (3, 1): W x + b = (3 + 2 + 0.5, -1) = (5.5, -1); A x = 2; s B A x = 3 * (4, 8) = (12, 24).
    assert torch.equal(model(torch.tensor([[3.0, 1.0]])), torch.tensor([[17.5, 23.0]]))
    # merged W = W + 3 B A = [[1, 2], [0, -1]] + [[6, -6], [12, -12]]
    assert torch.equal(vismt.merge(model)[0].weight, torch.tensor([[7.0, -4.0], [12.0, -13.0]]))


def test_blocks_do_not_mix() -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(2, 6, bias=False))
    vismt.adapt(model, "lora", rank=1, split_qkv=True)
    layer = model.qkv
    assert layer.lora_A.shape == (3, 2) and layer.lora_B.shape == (6, 1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.lora_B.fill_(1.0)
    # q sees x0 = 3, k sees x1 = 5, v sees x0 + x1 = 8; a fused pair or an interleaved layout would mix them.
    assert torch.equal(model(torch.tensor([[3.0, 5.0]])), torch.tensor([[3.0, 3.0, 5.0, 5.0, 8.0, 8.0]]))
    assert torch.equal(layer.low_rank().delta(), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 1], [1, 1]]))


@pytest.mark.parametrize("method", ["lora", "pissa", "polar"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_first_and_second_derivatives(method: str, split: bool, train_base: bool) -> None:
    model = single(method, alpha=3.0, split_qkv=split)
    model.qkv.weight.requires_grad_(train_base)
    model.qkv.bias.requires_grad_(train_base)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (x,)).sin()

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)  # in random directions


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func falls back to a loop for addmm_
@pytest.mark.parametrize("private", [True, False])
def test_functional_gradient_and_vmap_agree_with_autograd(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PRIVATE", private)
    model = single("pissa")
    x = torch.randn(4, 5, dtype=torch.double)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    functional = torch.func.grad(lambda d: torch.func.functional_call(model, d, (x,)).square().sum())(values)
    model(x).square().sum().backward()
    for name, value in functional.items():
        assert torch.allclose(value, model.get_parameter(name).grad)
    assert torch.allclose(torch.func.vmap(model)(x), model(x))


def test_bf16_base_keeps_fp32_factors_and_merges_by_one_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24)).to(torch.bfloat16)
    vismt.adapt(model, "pissa", rank=4, alpha=8.0)
    layer = model[0]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.no_grad():
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    total = layer.weight.float() + 2.0 * (layer.lora_B @ layer.lora_A) - 2.0 * (layer.lora_B0 @ layer.lora_A0)
    merged = vismt.merge(model)[0].weight
    assert merged.dtype == torch.bfloat16
    # One rounding: the fp32 sums differ by a few ulp at most, so nearly every entry rounds alike and none by two steps.
    assert (merged == total.to(torch.bfloat16)).float().mean() > 0.99
    assert ((merged.float() - total).abs() <= total.abs() * 2**-8).all()


def test_dropout_acts_on_the_update_alone() -> None:
    model = single("lora", dropout=0.5)
    x = torch.randn(4000, 5, dtype=torch.double)
    layer = model.qkv
    base = nn.functional.linear(x, layer.weight, layer.bias)
    model.eval()
    full = model(x)
    model.train()
    torch.manual_seed(0)
    noisy = model(x)
    assert not torch.allclose(noisy, full)
    # Inverted dropout: the expectation is the update itself; 4000 rows of std about 1 give a mean within 0.1.
    assert torch.allclose((noisy - base).mean(0), (full - base).mean(0), atol=0.2)
    noisy.sum().backward()
    assert layer.lora_A.grad is not None


def test_dropout_leaves_a_start_that_is_subtracted_alone() -> None:
    model = single("lora", dropout=0.5)
    layer, x = model.qkv, torch.randn(3, 5, dtype=torch.double)
    start = layer.lora_B @ layer.lora_A
    layer.set_factors(layer.lora_A, layer.lora_B, offset=True)
    nn.init.zeros_(layer.lora_B)
    expected = nn.functional.linear(x, layer.weight - layer.scale * start, layer.bias)
    assert torch.allclose(model.train()(x), expected)


def test_nothing_is_saved_but_input_and_hidden() -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    vismt.adapt(model, "lora", rank=4)
    x = torch.randn(10, 64, requires_grad=True)
    # x (10 x 64) and x A^T (10 x 4), fp32
    assert saved_activation_bytes(model, lambda: model(x).sum()) == 4 * (10 * 64 + 10 * 4)


def test_shared_module_is_adapted_once_under_every_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    vismt.adapt(model, "lora", rank=1)
    assert model["a"] is model["b"] and len(adapter_layers(model)) == 2
    vismt.unadapt(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear


def test_another_holder_of_the_stock_module_is_left_alone() -> None:
    shared = nn.Linear(4, 4)
    model, other = nn.Sequential(shared), nn.Sequential(shared)
    before = other(torch.ones(1, 4))
    vismt.adapt(model, "lora", rank=1)
    assert torch.equal(other(torch.ones(1, 4)), before)


@pytest.mark.slow
def test_inductor_where_a_compiler_exists() -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model = single("pissa").float()
    x = torch.randn(3, 5)
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_a_model_may_change_the_output_of_a_layer_in_place(
    shape: tuple[int, ...], private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.PRIVATE  # this release of torch has what the layer takes from it
    monkeypatch.setattr(fused, "PRIVATE", private)
    for name in ("transforms_active", "unwrap_dead_wrappers", "reshaped") if not private else ():
        monkeypatch.delattr(fused, name)
    model = nn.Sequential(nn.Linear(8, 8))
    vismt.adapt(model, "lora", rank=2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = model(x)
    out += x
    out.sum().backward()
    assert model[0].lora_B.grad is not None
