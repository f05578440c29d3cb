"""What depends on the device: on the CPU, on a simulated GPU, and on a GPU where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.every_method import LAYERS
from helpers.language_models import tokens
from helpers.lm_parts import tiny_lm
from helpers.simulated_gpu import simulated_gpu
from helpers.tiny import DIGITS, images, tiny_vit
from helpers.tiny_runs import CONFIGS, run_config, write_config
from torch import Tensor, nn

import vismt
from vismt.llm import collect_covariance
from vismt.lowrank.recompute import recompute
from vismt.robustness.attacks.attacks import ENSEMBLES, KINDS, AttackSpec, attack
from vismt.storage.lines import read_lines

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
OPTIONS = {
    **{"emtal": {"n_experts": 4}, "s2ft": {"ratio": 0.25}, "lisa": {"active": 1}},
    **{name: {"rank": 2} for name in ("lora", "pissa", "corda", "polar", "amt")},
}
# GPUs multiply float32 matrices in TF32 where a user allows it; by default the sums differ in their order alone.
TOLERANCE = 1e-4


@pytest.fixture(params=["cpu", "simulated", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, a simulated GPU (helpers/simulated_gpu.py), or a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with simulated_gpu() if request.param == "simulated" else nullcontext():
        yield "cpu" if request.param == "cpu" else "cuda"


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


@pytest.mark.parametrize("method", OPTIONS)
def test_a_model_trains_saves_loads_and_merges_where_it_lies(method: str, device: str, tmp_path: Path) -> None:
    model, x = tiny_vit().to(device), images().to(device)
    stock = model(x).detach()
    options = dict(OPTIONS[method])
    if method == "corda":
        options |= {"mode": "kpm", "covariances": collect_covariance(model, [x], LAYERS)}
    vismt.adapt(model, method, **options)
    assert all(parameter.device.type == device for parameter in model.parameters())
    if method == "emtal":
        vismt.multitask.set_fade(model, vismt.multitask.RouterFade(total_steps=1, start=0.0, end=0.0))
    trained(model, x)
    with torch.no_grad():
        after = model(x)
        assert not near(after, stock)
        loaded = vismt.load_adapter(tiny_vit().to(device), vismt.save_adapter(model, tmp_path))
        assert near(loaded(x), after)
        assert all(value.device.type == device for value in (*loaded.parameters(), *loaded.buffers()))
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


def test_gates_of_samples_are_where_the_model_lies(device: str) -> None:
    model, x = tiny_vit().to(device), images().to(device)
    vismt.adapt(model, "ilora", n_experts=2, gate=None)
    with vismt.llm.instance_gates(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]).to(device)):
        trained(model, x)
        with torch.no_grad():
            together, alone = model(x), []
    for row, gates in enumerate(([0.9, 0.1], [0.1, 0.9])):
        with vismt.llm.instance_gates(torch.tensor([gates]).to(device)), torch.no_grad():
            alone.append(model(x[row : row + 1]))
    assert near(together[:2], torch.cat(alone))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ENSEMBLES])
def test_an_attacked_image_is_what_the_model_sees_again(name: str, device: str) -> None:
    model, x = tiny_vit().to(device), images(8).to(device)
    labels = model(x).argmax(1)
    moved = attack(model, x, labels, AttackSpec(name, 0.1, steps=3), num_classes=5)
    assert moved.device.type == device and (moved - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(model(moved.clone()).argmax(1), model(moved).argmax(1))


@pytest.mark.parametrize("job", CONFIGS)
def test_a_run_of_each_job(job: str, device: str, tmp_path: Path) -> None:
    if device == "cpu":
        pytest.skip("tests/e2e has it")
    folder = run_config(write_config(job, tmp_path), *(["train.precision=bf16"] if job == "multitask" else []))
    assert json.loads((folder / "run.json").read_text())["hardware"].startswith("1 x ")
    assert (folder / "results.jsonl").stat().st_size and (folder / "report.html").exists()


def test_the_simulated_gpu_refuses_what_a_gpu_refuses() -> None:
    with simulated_gpu():
        here, there = torch.ones(3, requires_grad=True), torch.ones(3).to("cuda")
        for mistake in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.ones(3)[there.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                mistake()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.ones(3).device.type == "cpu" and F.one_hot(there.long()).device == there.device
        assert there[torch.tensor([0])].is_cuda and (there + torch.tensor(1)).tolist() == [2, 2, 2]
        (here.to("cuda") * there).sum().cpu().backward()
        assert here.grad is not None and here.grad.device.type == "cpu"
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "simulated"


@pytest.mark.gpu
@pytest.mark.parametrize("launch", ["torchrun", "fsdp"])
def test_two_processes_train_one_model(launch: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
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
