"""Weights that accelerate keeps elsewhere between calls: adapted before they are offloaded, and refused afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.readers import TARGETS, reader, run
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
WAYS = ("cpu", "disk")
METHODS: dict[str, dict] = {
    "lora": {},
    "pissa": {},
    "polar": {},
    "amt": {},
    "s2ft": {"ratio": 0.25},
    "lisa": {},
    "emtal": {"n_experts": 4},
    "peft:dora": {},
}


def offloaded(model: nn.Module, way: str, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, CPU) if way == "cpu" else accelerate.disk_offload(model, str(folder), CPU)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_is_refused_and_runs_on(way: str, method: str, tmp_path) -> None:
    model = offloaded(tiny_vit(), way, tmp_path)
    expected = model(images())
    with pytest.raises(UserError) as error:
        vismt.adapt(model, method, **METHODS[method])
    text = str(error.value)
    assert "'cls_token' has no values in memory" in text and "remove_hook_from_submodules" in text and "\n" not in text
    assert torch.equal(model(images()), expected) and torch.equal(expected, tiny_vit()(images()))


@pytest.mark.parametrize("way", WAYS)
def test_the_fix_of_the_message_works(way: str, tmp_path) -> None:
    model = offloaded(tiny_vit(), way, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    vismt.adapt(model, "pissa", rank=2)
    assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("way", WAYS)
def test_an_adapted_model_can_be_offloaded_for_inference(way: str, kind: str, tmp_path) -> None:
    model = reader(kind)
    vismt.adapt(model, "lora", TARGETS[kind], rank=2)
    shake(model, 0.1)
    expected = run(model, kind)
    vismt.save_adapter(model, tmp_path / "adapter")
    model = offloaded(model, way, tmp_path / "weights")
    assert torch.equal(run(model, kind), expected)
    for refused in (
        lambda: vismt.merge(model),
        lambda: vismt.unadapt(model),
        lambda: vismt.activate(model, None),
        lambda: vismt.save_adapter(model, tmp_path / "again"),
        lambda: vismt.load_adapter(model, tmp_path / "adapter"),
        lambda: vismt.export_peft(model, tmp_path / "peft"),
    ):
        with pytest.raises(UserError, match="no values"):
            refused()
    assert torch.equal(run(model, kind), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    merged = vismt.merge(copy.deepcopy(model))
    assert torch.allclose(run(merged, kind), expected, atol=1e-5)
