"""Defects measured in peft's PiSSA and CorDA, one test each: vismt has none of them, for either start."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.language_models import padded, relative, tiny_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from safetensors.torch import load_file
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance
from vismt.lowrank.layers.base import adapter_layers

STARTS = {
    "pissa": {},
    "pissa randomized": {"solver": "randomized"},
    "corda ipm": {"mode": "ipm"},
    "corda kpm": {"mode": "kpm"},
}
started = pytest.mark.parametrize("name", STARTS)


def start(model: nn.Module, name: str, batch: object = None, targets: object = None, **options: object) -> nn.Module:
    """Return the adapted model; CorDA's covariances are collected on `batch`, by default a padded batch."""
    method, settings = name.split()[0], STARTS[name]
    if method == "corda":
        if batch is None:
            batch = images() if hasattr(model, "patch_embed") else padded((30, 20, 12))
        settings = {**settings, "covariances": collect_covariance(model, [batch], targets)}
    vismt.adapt(model, method, targets, **{"rank": 4, **settings, **options})
    return model


@started
def test_scale_outside_the_root(name: str) -> None:
    """peft is right for alpha = r only: the product must not depend on alpha or rslora."""
    products = []
    for options in ({}, {"alpha": 16}, {"alpha": 3, "rslora": True}):
        host = start(tiny_lm("llama"), name, **options).model.layers[0].mlp.up_proj
        products.append(host.scale * host.lora_B @ host.lora_A)
    assert relative(products[1], products[0]) < 1e-5 and relative(products[2], products[0]) < 1e-5


@started
def test_base_is_mutated(name: str) -> None:
    """disable, unload and a second adapter must see the original base; a second adapter on top is refused."""
    model = start(tiny_lm("llama"), name)
    for key, value in tiny_lm("llama").state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(UserError, match="already carries"):
        vismt.adapt(model, "pissa", rank=2)


@started
def test_start_is_recomputed_on_loading(name: str, tmp_path) -> None:
    """A trained adapter must give the same outputs after loading for any random state, also with CorDA and on meta-free bases."""
    model = shake(start(tiny_lm("qwen2"), name))
    vismt.save_adapter(model, tmp_path)
    torch.manual_seed(123)
    assert torch.equal(vismt.load_adapter(tiny_lm("qwen2"), tmp_path)(tokens()).logits, model(tokens()).logits)


@started
def test_export_asks_for_the_start_again(name: str, tmp_path) -> None:
    """init_lora_weights must be true, the rank doubled with its scale, per-module ranks written out."""
    model = shake(
        start(tiny_vit(num_classes=5), name, targets=["qkv", "head"], rank=8, alpha=4, rslora=True, clamp_rank=True)
    )
    vismt.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["init_lora_weights"] is True
        and config["use_rslora"] is False
        and config["r"] == config["lora_alpha"] == 16
    )
    assert config["rank_pattern"] == config["alpha_pattern"] == {"head": 10}
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(tiny_vit(num_classes=5), str(tmp_path)).eval()
    assert torch.allclose(theirs(images()), model(images()), atol=1e-5)


@started
def test_rank_larger_than_the_matrix(name: str, tmp_path) -> None:
    """The rank is clamped and recorded, or refused; no factor has fewer rows than its rank."""
    with pytest.raises(UserError, match="clamp_rank"):
        start(tiny_vit(), name, targets=["head"], rank=16)
    model = start(tiny_vit(), name, targets=["head"], rank=16, alpha=32, clamp_rank=True)
    assert (model.head.rank, model.head.scale, tuple(model.head.lora_A.shape)) == (5, 6.4, (5, 32))
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(vismt.load_adapter(tiny_vit(), tmp_path)(images()), model(images()))


@started
def test_dropout_is_taken(name: str) -> None:
    with pytest.raises(UserError, match="dropout"):
        start(tiny_vit(), name, dropout=0.5)


@started
def test_global_random_state(name: str) -> None:
    model = tiny_vit()
    before = torch.get_rng_state()
    start(model, name)
    assert torch.equal(torch.get_rng_state(), before)


@started
def test_conv1d_is_not_transposed(name: str) -> None:
    model = start(tiny_lm("gpt2"), name)
    assert tuple(model.transformer.h[0].attn.c_attn.lora_A.shape) == (4, 32)
    assert tuple(model.transformer.h[0].attn.c_attn.lora_B.shape) == (96, 4)
    assert torch.allclose(model(tokens()).logits, tiny_lm("gpt2")(tokens()).logits, atol=1e-5)


@started
def test_tied_weights_are_written_twice(name: str) -> None:
    with pytest.raises(UserError, match=r"'lm_head' shares its weight with 'transformer.wte.weight'"):
        vismt.adapt(tiny_lm("gpt2"), name.split()[0], ["lm_head"], rank=4)


@started
def test_convolutions_are_unknown(name: str) -> None:
    model = start(tiny_vit(), name, targets=["patch_embed.proj"])
    assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)


@started
def test_trained_head_is_dropped(name: str, tmp_path) -> None:
    model = shake(start(tiny_vit(), name, also_train=["head"]))
    vismt.export_peft(model, tmp_path)
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.head.weight"], model.head.weight
    )


@started
def test_biases_are_trained(name: str) -> None:
    model = start(tiny_lm("qwen2"), name)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key.endswith("bias"))


@started
def test_packed_weights_are_decomposed(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        vismt.adapt(model, name.split()[0], ["0"], rank=2)


@started
def test_factors_are_rounded_after_the_residual(name: str) -> None:
    model = tiny_lm("llama").to(torch.bfloat16)
    original = copy.deepcopy(model.state_dict())
    vismt.merge(start(model, name, alpha=8, dtype="bfloat16"))
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


def test_one_sample_at_a_time() -> None:
    """For any batch and padding the start is that of single samples."""
    batch = padded((30, 20, 12))
    singles = [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    whole, by_sample = (collect_covariance(tiny_lm("llama"), batches) for batches in ([batch], singles))
    assert all(relative(whole[path], by_sample[path]) < 1e-5 for path in whole)


def test_calibration_leaves_traces() -> None:
    """Train mode is restored, and no hook or attribute is left on a module."""
    model = tiny_lm("llama").train()
    names = {path: set(vars(module)) for path, module in model.named_modules()}
    collect_covariance(model, [padded()])
    assert model.training and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert names == {path: set(vars(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize("name", [name for name in STARTS if name.startswith("corda")])
def test_negative_and_zero_inputs(name: str) -> None:
    """The divisor is the largest absolute value; an input of zeros, a single sample or a repeated token still give a start."""
    for batch in (torch.zeros(1, 3, 16, 16), -torch.ones(1, 3, 16, 16), images(1)):
        model = start(tiny_vit(), name, batch, ["qkv", "patch_embed.proj"])
        assert all(
            host.lora_A.isfinite().all() and host.lora_B.abs().sum() > 0 for host in adapter_layers(model).values()
        )
        assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)
