"""What depends on the device, on the CPU and on a GPU where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.language_models import tokens
from helpers.lm_parts import tiny_lm
from helpers.tiny import DIGITS, images, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.lowrank.recompute import recompute
from vismt.robustness.attacks.attacks import AttackSpec, attack
from vismt.storage.lines import read_lines

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
METHODS = ("lora", "pissa", "polar", "s2ft", "lisa", "emtal")
# GPUs multiply float32 matrices in TF32 where a user allows it; by default the sums differ in their order alone.
TOLERANCE = 1e-4


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    """Take steps on labels that the model gets wrong at first."""
    labels = (model(x).argmax(1) + 1) % 5
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
    return model


def near(seen: Tensor, wanted: Tensor) -> bool:
    return bool((seen.cpu() - wanted.cpu()).abs().max() <= TOLERANCE * wanted.abs().max().cpu())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_trains_and_merges_where_it_lies(method: str, device: str) -> None:
    model, x = tiny_vit().to(device), images().to(device)
    stock = model(x)
    vismt.adapt(model, method, **({"n_experts": 4} if method == "emtal" else {}))
    assert all(parameter.device.type == device for parameter in model.parameters())
    if method == "emtal":
        vismt.multitask.set_fade(model, vismt.multitask.RouterFade(total_steps=1, start=0.0, end=0.0))
    trained(model, x)
    after = model(x)
    assert not near(after, stock)
    vismt.merge(model)
    assert near(model(x), after) and near(model.cpu()(x.cpu()), after)


def test_a_step_in_bf16_moves_towards_the_labels(device: str) -> None:
    model, x = tiny_vit().to(device), images().to(device)
    vismt.adapt(model, "lora")
    labels = (model(x).argmax(1) + 1) % 5
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        with torch.autocast(device, torch.bfloat16):
            losses.append(nn.functional.cross_entropy(model(x), labels))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert all(torch.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


def test_recomputed_gradients_are_the_stored_ones(device: str) -> None:
    model, ids = tiny_lm().to(device), tokens(3).to(device)
    vismt.adapt(model, "lora", rank=2)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stored = torch.autograd.grad(model(ids).logits.square().mean(), factors)
    with recompute(model):
        again = torch.autograd.grad(model(ids).logits.square().mean(), factors)
    assert all(near(ours, theirs) for ours, theirs in zip(again, stored, strict=True))


def test_a_mixed_batch_is_each_adapter_alone(device: str) -> None:
    model, x = tiny_vit().to(device), images().to(device)
    for seed, name in enumerate("ab"):
        vismt.adapt(model, "lora", seed=seed, name=name)
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    alone = []
    for name in "ab":
        vismt.activate(model, name)
        alone.append(model(x))
    vismt.activate(model, ["a", "b"])
    with vismt.adapters_per_sample(["a", "b", "a"]):
        mixed = model(x)
    assert near(mixed, torch.stack([alone[0][0], alone[1][1], alone[0][2]])) and not near(alone[0], alone[1])


def test_an_attacked_image_is_what_the_model_sees_again(device: str) -> None:
    model, x = tiny_vit().to(device), images(8).to(device)
    labels = model(x).argmax(1)
    moved = attack(model, x, labels, AttackSpec(epsilon=0.1, steps=10), num_classes=5)
    assert moved.device.type == device and (moved - x).abs().max() <= 0.1 + 1e-6
    answers = model(moved).argmax(1)
    assert (answers != labels).any() and torch.equal(model(moved.clone()).argmax(1), answers)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "fsdp"])
def test_two_processes_train_one_model(launch: str, device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**DIGITS, "adapt": {"method": "lora", "rank": 2}}))
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    words = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m", "vismt.cli", "run", path]
    process = subprocess.run(
        [sys.executable, "-m", *map(str, words), "--out", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **(sharded if launch == "fsdp" else {})},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    assert len(read_lines(next(folder.glob("arms/**/metrics.jsonl")))) == 2 and (folder / "report.html").exists()
