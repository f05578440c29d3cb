"""Defects measured in peft's PiSSA and CorDA that the tests of the methods do not show: vismt has none of them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.language_models import padded, relative, tiny_lm
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
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


@pytest.mark.parametrize("name", [name for name in STARTS if name.startswith("corda")])
def test_negative_and_zero_inputs(name: str) -> None:
    """The divisor is the largest absolute value; an input of zeros, a single sample or a repeated token still give a start."""
    for batch in (torch.zeros(1, 3, 16, 16), -torch.ones(1, 3, 16, 16), images(1)):
        model = start(tiny_vit(), name, batch, ["qkv", "patch_embed.proj"])
        assert all(
            host.lora_A.isfinite().all() and host.lora_B.abs().sum() > 0 for host in adapter_layers(model).values()
        )
        assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)
