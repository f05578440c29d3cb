"""The defects that were measured in peft's PiSSA and CorDA, one line each: none of them may be ours, for either start."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from llm_parts import padded, relative, tiny_lm, tokens
from safetensors.torch import load_file
from tiny import images, shake, tiny_vit
from torch import nn

import vismt
from vismt.errors import UserError
from vismt.llm import collect_covariance
from vismt.lowrank.inject import adapted_modules

STARTS = {
    "pissa": {}, "pissa randomized": {"method": "randomized"}, "corda ipm": {"mode": "ipm"}, "corda kpm": {"mode": "kpm"},
}


def start(model: nn.Module, name: str, batch: object = None, targets: object = None, **options: object) -> nn.Module:
    """The model adapted; CorDA's covariances are collected on `batch`, by default a padded one."""
    method, own = name.split()[0], STARTS[name]
    if method == "corda":
        batch = batch if batch is not None else images() if hasattr(model, "patch_embed") else padded((30, 20, 12))
        own = {**own, "covariances": collect_covariance(model, [batch], targets)}
    vismt.adapt(model, method, targets, **{"rank": 4, **own, **options})
    return model


def scale_outside_the_root(name: str, folder) -> None:
    """Right only for alpha = r: the product must not depend on alpha or rslora."""
    products = []
    for options in ({}, {"alpha": 16}, {"alpha": 3, "rslora": True}):
        host = start(tiny_lm("llama"), name, **options).model.layers[0].mlp.up_proj
        products.append(host.scale * host.lora_B @ host.lora_A)
    assert relative(products[1], products[0]) < 1e-5 and relative(products[2], products[0]) < 1e-5


def base_is_mutated(name: str, folder) -> None:
    """disable, unload and a second adapter must see the base as it was; a second adapter on top is refused."""
    model = start(tiny_lm("llama"), name)
    for key, value in tiny_lm("llama").state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(UserError, match="already carries"):
        vismt.adapt(model, "pissa", rank=2)


def start_is_recomputed_on_loading(name: str, folder) -> None:
    """A trained adapter must load to the same outputs whatever the random state is, also a CorDA, also on meta-free bases."""
    model = shake(start(tiny_lm("qwen2"), name))
    vismt.save_adapter(model, folder)
    torch.manual_seed(123)
    assert torch.equal(vismt.load_adapter(tiny_lm("qwen2"), folder)(tokens()).logits, model(tokens()).logits)


def export_asks_for_the_start_again(name: str, folder) -> None:
    """init_lora_weights must be true, the rank doubled with its scale, per-module ranks written out."""
    model = shake(start(tiny_vit(num_classes=5), name, targets=["qkv", "head"], rank=8, alpha=4, rslora=True, clamp_rank=True))
    vismt.export_peft(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["use_rslora"] is False and config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {"head": 10}
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(tiny_vit(num_classes=5), str(folder)).eval()
    assert torch.allclose(theirs(images()), model(images()), atol=1e-5)


def rank_larger_than_the_matrix(name: str, folder) -> None:
    """Clamped and recorded, or refused; never a factor with fewer rows than its rank."""
    with pytest.raises(UserError, match="clamp_rank"):
        start(tiny_vit(), name, targets=["head"], rank=16)
    model = start(tiny_vit(), name, targets=["head"], rank=16, alpha=32, clamp_rank=True)
    assert (model.head.rank, model.head.scale, tuple(model.head.lora_A.shape)) == (5, 6.4, (5, 32))
    vismt.save_adapter(model, folder)
    assert torch.equal(vismt.load_adapter(tiny_vit(), folder)(images()), model(images()))


def dropout_is_taken(name: str, folder) -> None:
    with pytest.raises(UserError, match="dropout"):
        start(tiny_vit(), name, dropout=0.5)


def global_random_state(name: str, folder) -> None:
    model = tiny_vit()
    before = torch.get_rng_state()
    start(model, name)
    assert torch.equal(torch.get_rng_state(), before)


def conv1d_is_not_transposed(name: str, folder) -> None:
    model = start(tiny_lm("gpt2"), name)
    assert tuple(model.transformer.h[0].attn.c_attn.lora_A.shape) == (4, 32)
    assert tuple(model.transformer.h[0].attn.c_attn.lora_B.shape) == (96, 4)
    assert torch.allclose(model(tokens()).logits, tiny_lm("gpt2")(tokens()).logits, atol=1e-5)


def tied_weights_are_written_twice(name: str, folder) -> None:
    with pytest.raises(UserError, match=r"'lm_head' shares its weight with 'transformer.wte.weight'"):
        vismt.adapt(tiny_lm("gpt2"), name.split()[0], ["lm_head"], rank=4)


def convolutions_are_unknown(name: str, folder) -> None:
    model = start(tiny_vit(), name, targets=["patch_embed.proj"])
    assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)


def trained_head_is_dropped(name: str, folder) -> None:
    model = shake(start(tiny_vit(), name, also_train=["head"]))
    vismt.export_peft(model, folder)
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["base_model.model.head.weight"], model.head.weight)


def biases_are_trained(name: str, folder) -> None:
    model = start(tiny_lm("qwen2"), name)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key.endswith("bias"))


def packed_weights_are_decomposed(name: str, folder) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        vismt.adapt(model, name.split()[0], ["0"], rank=2)


def factors_are_rounded_after_the_residual(name: str, folder) -> None:
    model = tiny_lm("llama").to(torch.bfloat16)
    original = copy.deepcopy(model.state_dict())
    vismt.merge(start(model, name, alpha=8, dtype="bfloat16"))
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


def one_sample_at_a_time(name: str, folder) -> None:
    """Any batch, any padding: the same start as from single samples."""
    if not name.startswith("corda"):
        pytest.skip("PiSSA has no calibration")
    batch = padded((30, 20, 12))
    singles = [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    whole, one = (collect_covariance(tiny_lm("llama"), batches) for batches in ([batch], singles))
    assert all(relative(whole[path], one[path]) < 1e-5 for path in whole)


def calibration_leaves_traces(name: str, folder) -> None:
    """Train mode comes back, no hook stays, no attribute is left on a module."""
    if not name.startswith("corda"):
        pytest.skip("PiSSA has no calibration")
    model = tiny_lm("llama").train()
    names = {path: set(vars(module)) for path, module in model.named_modules()}
    collect_covariance(model, [padded()])
    assert model.training and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert names == {path: set(vars(module)) for path, module in model.named_modules()}


def negative_and_zero_inputs(name: str, folder) -> None:
    """The largest absolute value divides; an input of zeros, one sample or a repeated token still give a start."""
    if not name.startswith("corda"):
        pytest.skip("PiSSA has no calibration")
    for batch in (torch.zeros(1, 3, 16, 16), -torch.ones(1, 3, 16, 16), images(1)):
        model = start(tiny_vit(), name, batch, ["qkv", "patch_embed.proj"])
        assert all(host.lora_A.isfinite().all() and host.lora_B.abs().sum() > 0 for host in adapted_modules(model).values())
        assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)


DEFECTS = [
    scale_outside_the_root, base_is_mutated, start_is_recomputed_on_loading, export_asks_for_the_start_again,
    rank_larger_than_the_matrix, dropout_is_taken, global_random_state, conv1d_is_not_transposed,
    tied_weights_are_written_twice, convolutions_are_unknown, trained_head_is_dropped, biases_are_trained,
    packed_weights_are_decomposed, factors_are_rounded_after_the_residual, one_sample_at_a_time, calibration_leaves_traces,
    negative_and_zero_inputs,
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.parametrize("name", STARTS)
def test_defect_is_not_ours(defect, name: str, tmp_path) -> None:
    defect(name, tmp_path)
