"""Factor methods on bases in packed formats, and QLoRA of peft on the same base as oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language_models import random_lm, tokens
from helpers.packed import FORMATS
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, instance_gates
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.forms import LowRankPrequantized
from vismt.lowrank.layers.stock_modules import dense_weight, use_cpu_kernel
from vismt.lowrank.model.merge import merged_copy

WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 6},
    "pissa": {},
    "amt": {},
    "polar": {},
    "ilora": {"n_experts": 2},
    "corda": {"mode": "kpm"},
}
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def gates() -> Iterator[None]:
    with instance_gates(torch.tensor([0.3, 0.7])):
        yield


def base(kind: str) -> nn.Module:
    return FORMATS[kind](random_lm("llama", **WIDE)).eval()


def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {path: dense_weight(m).clone() for path, m in model.named_modules() if path.endswith(tuple(TARGETS))}


def on_cpu_kernel(module: nn.Module) -> bool:
    """Return whether the weight is converted for the 4-bit kernel of a CPU with AVX512-BF16."""
    return getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", FORMATS)
def test_dense_is_what_the_module_computes_with(kind: str) -> None:
    module = base(kind).model.layers[0].mlp.down_proj
    x = torch.randn(5, module.in_features)
    share = 0.02 if kind == "bitsandbytes-8" else 1e-5  # LLM.int8 rounds its inputs, too
    for _ in range(
        2
    ):  # bitsandbytes moves the scales of 8 bits in the first call, and may convert the weight of 4 bits
        y, weight = module(x), dense_weight(module).float()
        expected = x @ weight.t()
        if on_cpu_kernel(module):  # rounds inputs, weights and outputs to bfloat16, each by half its eps
            assert ((y - expected).abs() <= torch.finfo(torch.bfloat16).eps * 1.5 * (x.abs() @ weight.t().abs())).all()
        else:
            assert (y - expected).abs().max() < share * expected.abs().max()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_every_factor_method_keeps_its_promises(kind: str, method: str, tmp_path: Path) -> None:
    model, stock = base(kind), base(kind)
    options = dict(METHODS[method])
    if method == "corda":
        options["covariances"] = collect_covariance(base(kind), [tokens()], TARGETS)
    before, weights = logits(stock), bits(stock)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    vismt.adapt(model, method, TARGETS, rank=2, **options)
    assert all(isinstance(layer, LowRankPrequantized) for layer in adapter_layers(model).values())
    if method != "ilora":  # its B is not zero
        assert torch.allclose(logits(model), before, atol=1e-4)
    shake(model)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("instance_gate."):  # the gates of this test are fixed
            assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    vismt.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(vismt.load_adapter(base(kind), tmp_path / "a")), expected)
    with pytest.raises(UserError, match=r"merge: .* has a packed weight .*merge there"):
        vismt.merge(model)
    assert torch.equal(logits(model), expected)
    vismt.unadapt(model)
    assert torch.equal(logits(model), before) and all(torch.equal(bits(model)[p], w) for p, w in weights.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("kind", FORMATS)
def test_pissa_starts_from_the_numbers_that_are_packed(kind: str) -> None:
    model = base(kind)
    weight = dense_weight(model.model.layers[0].mlp.down_proj).float()
    vismt.adapt(model, "pissa", TARGETS, rank=3)
    layer = model.model.layers[0].mlp.down_proj
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(layer.lora_B @ layer.lora_A, U[:, :3] * S[:3] @ V[:3], atol=1e-4)


def test_a_base_that_was_evaluated_before_is_read_and_trained(tmp_path: Path) -> None:
    """An evaluation on a CPU with AVX512-BF16 converts 4-bit weights for a kernel that has no backward; here for every CPU."""
    fresh, evaluated = base("bitsandbytes-4"), base("bitsandbytes-4")
    convert = getattr(pytest.importorskip("bitsandbytes").functional, "_convert_weight_packed_for_cpu", None)
    if convert is None:
        pytest.skip("this bitsandbytes has no kernel for CPUs")
    for module in evaluated.modules():
        if hasattr(module, "quant_state"):
            module.weight.data, module.weight.quant_state = convert(module.weight.data, module.weight.quant_state)
    rounding = torch.finfo(torch.bfloat16).eps / 2  # of the scales
    for path, expected in bits(fresh).items():
        assert ((bits(evaluated)[path] - expected).abs() <= 1.01 * rounding * expected.abs()).all()
    vismt.adapt(fresh, "lora", TARGETS, rank=2)
    shake(fresh)
    vismt.save_adapter(fresh, tmp_path)
    vismt.load_adapter(evaluated, tmp_path)
    with torch.no_grad():
        logits(evaluated)
    for model in (fresh, evaluated):
        assert not any(map(on_cpu_kernel, model.modules()))
        logits(model).square().mean().backward()
    for ours, theirs in zip(fresh.parameters(), evaluated.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0) > 0.99


@pytest.mark.parametrize("kind", ["bitsandbytes-4", "bitsandbytes-8", "torchao-int8"])
def test_qlora_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = base(kind)
    vismt.adapt(ours, "lora", TARGETS, rank=4, alpha=6)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    theirs = peft.get_peft_model(base(kind), config).eval()
    use_cpu_kernel(theirs, False)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for path, layer in adapter_layers(ours).items():
        tuner = theirs.get_submodule(f"base_model.model.{path}")
        for mine, other in ((layer.lora_A, tuner.lora_A), (layer.lora_B, tuner.lora_B)):
            value = 0.2 * torch.randn(mine.shape, generator=generator)
            mine.data.copy_(value)
            other["default"].weight.data.copy_(value)
            pairs.append((mine, other["default"].weight))
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    for model in (ours, theirs):
        torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), tokens().flatten()).backward()
    assert all((mine.grad - other.grad).abs().max() < 1e-5 and mine.grad.abs().max() > 1e-4 for mine, other in pairs)
    vismt.export_peft(ours, tmp_path / "peft")
    read = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "peft")).eval()
    use_cpu_kernel(read, False)
    assert (logits(read) - logits(ours)).abs().max() < 1e-5
    assert torch.allclose(logits(vismt.import_peft(base(kind), tmp_path / "peft")), logits(ours), atol=1e-5)


@pytest.mark.parametrize("kind", ["bitsandbytes-4", "torchao-int4"])
def test_an_adapter_of_a_packed_base_merges_into_the_dense_one(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    vismt.adapt(model, "lora", TARGETS, rank=2)
    shake(model)
    vismt.save_adapter(model, tmp_path)
    dense = random_lm("llama", **WIDE)
    with pytest.warns(UserWarning, match="was made for"):
        vismt.load_adapter(dense, tmp_path, on_other_base="warn")
    update = dense.model.layers[0].mlp.down_proj.low_rank().delta()
    weight = dense.model.layers[0].mlp.down_proj.weight.detach().clone()
    vismt.merge(dense)
    assert torch.allclose(dense.model.layers[0].mlp.down_proj.weight, weight + update, atol=1e-6)


@pytest.mark.parametrize("method,options", [
    ("s2ft", {"ratio": 0.25}),
    ("pissa", {"quantize": "nf4"}),
    ("lora", {"also_train": [r"model\.layers\.0\.self_attn\.k_proj"]}),
])  # fmt: skip
def test_methods_that_use_the_weight_itself_are_refused(method: str, options: dict[str, Any]) -> None:
    model = base("bitsandbytes-4")
    before, classes = logits(model), [type(module) for module in model.modules()]
    targets = {} if method == "s2ft" else {"targets": TARGETS}
    with pytest.raises(UserError, match=r"quantised|packed"):
        vismt.adapt(model, method, **targets, **options)
    assert torch.equal(logits(model), before) and [type(module) for module in model.modules()] == classes


def test_a_router_does_not_move_the_units_of_packed_weights() -> None:
    model = FORMATS["bitsandbytes-4"](tiny_vit(embed_dim=64))
    with pytest.raises(UserError, match=r"'blocks\.0\.mlp\.fc1' is quantised \(bitsandbytes Params4bit\)"):
        vismt.adapt(model, "emtal", n_experts=4)
    vismt.adapt(model, "lora", split_qkv=True, rank=2)
    shake(model)(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_hosted_tuner_on_four_bits() -> None:
    model, stock = base("bitsandbytes-4"), base("bitsandbytes-4")
    vismt.adapt(model, "peft:dora", TARGETS, rank=2)
    assert torch.allclose(logits(model), logits(stock), atol=1e-4)
    shake(model)
    vismt.unadapt(model)
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_merged_copy_in_half_precision_keeps_packed_weights(kind: str) -> None:
    model, x = base(kind), tokens()
    vismt.adapt(model, "lora", TARGETS, rank=2)
    shake(model, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        seen, wanted = merged_copy(model, torch.bfloat16)(x).logits, model(x).logits
    assert (seen - wanted).abs().max() < 0.05 * wanted.abs().max()
