"""The benchmark of the floor on a tiny model: what it counts, and that its step is the stock model's."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest
import torch
from helpers.tiny import images, tiny_vit
from torch import Tensor, nn

from scripts.bench import core, floor
from scripts.bench.core import LORA, PEFT
from vismt.lowrank.layers.base import adapter_layers


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(images()), torch.arange(3))


def test_products_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "RANK", 2)
    variants = core._variants(tiny_vit().train(), "head")
    products = floor._products(variants[LORA], loss)
    assert products.keys() == adapter_layers(variants[LORA]).keys()
    # The patches have no gradient, nor has the first layer's input.
    first, *others = products.values()
    assert not first.inner and all(part.inner for part in others)
    n, (o, i) = len(others[0].x), others[0].W.shape
    assert others[0].gigaflops() == pytest.approx((4e-9 * n * i * o, 6e-9 * n * 2 * (i + o)))
    result = floor.compare("tiny", variants[LORA], variants[PEFT], loss, "head", 1, torch.device("cpu"))
    assert [c.name for c in result.comparisons()] == [LORA, floor.FLOOR, floor.FROZEN, floor.THIN]
    assert all(c.ratio > 0 and c.target is None for c in result.comparisons())


def test_both_models_are_measured_in_both_types(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_vit().train(), loss, "head"
    monkeypatch.setattr(core, "RANK", 2)
    monkeypatch.setattr(core, "_llama", lambda device: net)
    monkeypatch.setattr(core, "_vit", create_autospec(core._vit, return_value=net))
    monkeypatch.setattr(floor, "compare", lambda title, *others: title)
    vit, llama = "timm ViT-S/16, 8 x 224 px", "Llama 512 x 8, 4 x 128 tokens"
    assert floor.run(1) == [vit, f"{vit}, bf16", llama, f"{llama}, bf16"]
