"""The Landing optimiser: its effect on gradients, and its use with torch schedulers, gradient scalers and accelerate."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.ranks import run_two
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import Landing
from vismt.llm.polar.landing import CONSTRAINTS, RETRACTIONS, updates
from vismt.llm.polar.stiefel import infeasibility
from vismt.lowrank.layers.base import adapter_layers
from vismt.methods import method_optimizer


def adapted(seed: int = 0, **options: object) -> nn.Module:
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=3, seed=seed, split_qkv=True, **options)
    return shake(model, 0.1)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: nn.Module, number: int = 0, part: slice = slice(None)) -> Tensor:
    return nn.functional.cross_entropy(model(images(6, seed=number).double()[part]), (torch.arange(6) % 5)[part])


def worst(model: nn.Module) -> float:
    """Return the largest infeasibility of any factor."""
    return max(
        float(infeasibility(z)) for host in adapter_layers(model).values() for x, _, y in updates(host) for z in (x, y)
    )


def by_definition(z: Tensor, grad: Tensor, attraction: float, kind: str = "landing") -> Tensor:
    """Return the field computed with the n x n skew matrix of the released code."""
    turned = grad if kind == "euclidean" else (grad @ z.T - z @ grad.T) @ z
    return turned + attraction * z @ (z.T @ z - torch.eye(z.shape[1], dtype=z.dtype))


@pytest.mark.parametrize("kind", ["landing", "euclidean"])
def test_one_step_of_sgd_is_the_field_of_each_factor_of_each_block(kind: str) -> None:
    model = adapted()
    landing = Landing(torch.optim.SGD(trained(model), lr=0.1), model, 0.7, constraint=kind)
    loss_of(model).backward()
    expected = {}
    for path, host in adapter_layers(model).items():
        A, B, C = (getattr(host, name) for name in ("lora_A", "lora_B", "lora_C"))
        # lora_A holds Y^T, block under block; lora_B X, block under block of the outputs.
        Y, rows = zip(
            *[(z.T, by_definition(z.T, g.T, 0.7, kind).T) for z, g in zip(A.detach().split(3), A.grad.split(3))]
        )
        X = [by_definition(z, g, 0.7, kind) for z, g in zip(B.detach().split(host.blocks), B.grad.split(host.blocks))]
        assert all(y.shape[0] >= y.shape[1] for y in Y)
        expected[path] = (A - 0.1 * torch.cat(rows), B - 0.1 * torch.cat(X), C - 0.1 * C.grad)
    landing.step()
    for path, host in adapter_layers(model).items():
        for value, wanted in zip((host.lora_A, host.lora_B, host.lora_C), expected[path]):
            assert torch.allclose(value, wanted, atol=1e-12), path


def test_the_size_of_a_stack_changes_nothing(monkeypatch) -> None:
    ends = []
    for size in (2**22, 1, 200):
        monkeypatch.setattr("vismt.llm.polar.landing.STACK", size)
        model = adapted()
        landing = Landing(torch.optim.AdamW(trained(model), lr=1e-2), model)
        loss_of(model).backward()
        landing.step()
        ends.append((copy.deepcopy(trained(model)), landing.metrics()))
    for parameters, metrics in ends[1:]:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(parameters, ends[0][0]))
        assert all(torch.allclose(metrics[name], ends[0][1][name]) for name in metrics)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_accumulated_batches_are_one_batch(constraint: str) -> None:
    """The pull is applied once per step, for any number of backward passes."""
    ends = []
    for parts in ([slice(None)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        model = adapted()
        landing = Landing(torch.optim.SGD(trained(model), lr=0.1), model, 0.9, constraint=constraint)
        for _ in range(2):
            for part in parts:
                (loss_of(model, part=part) / len(parts)).backward()
            landing.step()
            landing.zero_grad()
        ends.append(trained(model))
    assert all(torch.allclose(first, second, atol=1e-12) for first, second in zip(*ends))


def test_clipping_comes_before_the_pull() -> None:
    """The field uses the clipped gradient; the pull of a factor far from the manifold is not clipped."""
    model = shake(adapted(), 0.5)
    landing = Landing(torch.optim.SGD(trained(model), lr=1.0), model, 1.0)
    host = model.blocks[0].mlp.fc1
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(trained(model), 1e-3)
    z, clipped = host.lora_B.detach().clone(), host.lora_B.grad.clone()
    assert clipped.norm() <= 1e-3
    landing.step()
    moved = z - host.lora_B
    assert torch.allclose(moved, by_definition(z, clipped, 1.0), atol=1e-12) and moved.norm() > 0.1


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_frozen_factors_and_those_of_others_stay(constraint: str) -> None:
    model = adapted()
    frozen, other = model.blocks[0].mlp.fc1, model.blocks[1].mlp.fc2
    mine = [parameter for parameter in trained(model) if parameter is not other.lora_B]
    frozen.lora_A.requires_grad_(False)  # in the optimiser, but without a gradient
    expected = [frozen.lora_A.clone(), other.lora_B.clone()]
    landing = Landing(torch.optim.SGD(mine, lr=0.1), model, 0.5, constraint=constraint)
    loss_of(model).backward()
    before = frozen.lora_B.clone()
    landing.step()
    assert torch.equal(frozen.lora_A, expected[0]) and torch.equal(other.lora_B, expected[1])
    assert not torch.equal(frozen.lora_B, before)


def test_sgd_stays_near_the_manifold_and_the_pull_brings_it_back() -> None:
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=3)
    with torch.no_grad():
        for host in adapter_layers(model).values():
            host.lora_C.normal_(generator=torch.Generator().manual_seed(1))
    landing = Landing(torch.optim.SGD(trained(model), lr=0.05), model, 1.0)
    losses, highest = [], 0.0
    for _ in range(40):
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        landing.zero_grad()
        loss.backward()
        landing.step()
        highest = max(highest, worst(model))
    assert losses[-1] < losses[0] and 0 < highest < 0.1
    shake(model, 0.05)  # off the manifold
    far = worst(model)
    for _ in range(40):
        landing.zero_grad()
        loss_of(model).backward()
        landing.step()
    assert worst(model) < 0.1 * far


def test_adam_leaves_the_manifold_the_less_the_stronger_the_pull() -> None:
    infeasibilities = []
    for attraction in (0.0, 5e-3, 1.0):
        model = adapted()
        landing = Landing(torch.optim.AdamW(trained(model), lr=2e-2), model, attraction)
        for _ in range(25):
            landing.zero_grad()
            loss_of(model).backward()
            landing.step()
        infeasibilities.append(float(landing.metrics()["infeasibility"]))
    # Adam's scaling of each number breaks tangency: the published 5e-3 has almost the effect of no pull.
    assert infeasibilities[0] > infeasibilities[1] > 2 * infeasibilities[2] > 0


@pytest.mark.parametrize("constraint", RETRACTIONS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_retractions_end_every_step_on_the_manifold(constraint: str, optimizer: type) -> None:
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=3, split_qkv=True)
    landing = Landing(optimizer(trained(model), lr=2e-2), model, constraint=constraint)
    start = [parameter.detach().clone() for parameter in trained(model)]
    losses = []
    for _ in range(12):
        landing.zero_grad()
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        loss.backward()
        landing.step()
        assert worst(model) < 1e-20
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before, after) for before, after in zip(start, trained(model)))


def test_a_retracted_step_leaves_the_step_at_second_order() -> None:
    """With plain SGD all constraints step by -lr times the tangent field, up to terms of second order in the rate."""
    ends = {}
    for rate in (1e-2, 1e-3):
        for constraint in ("landing", *RETRACTIONS):
            model = tiny_vit().double()
            vismt.adapt(model, "polar", rank=3)
            with torch.no_grad():
                for host in adapter_layers(model).values():
                    host.lora_C.copy_(torch.eye(3, dtype=torch.double))
            landing = Landing(torch.optim.SGD(trained(model), lr=rate), model, 0.0, constraint=constraint)
            (100 * loss_of(model)).backward()
            landing.step()
            ends[rate, constraint] = torch.cat(
                [host.lora_B.detach().flatten() for host in adapter_layers(model).values()]
            )
    for constraint in RETRACTIONS:
        gaps = [float((ends[rate, constraint] - ends[rate, "landing"]).norm()) for rate in (1e-2, 1e-3)]
        assert gaps[1] > 1e-9 and gaps[0] / gaps[1] == pytest.approx(100, rel=0.2)


def test_decoupled_pull_is_a_share_whatever_adam_does() -> None:
    model = adapted()
    host = model.blocks[0].mlp.fc2
    twin = copy.deepcopy(model)
    other = twin.blocks[0].mlp.fc2
    landing = Landing(torch.optim.AdamW(trained(model), lr=1e-2), model, 0.3, constraint="decoupled")
    plain = Landing(torch.optim.AdamW(trained(twin), lr=1e-2), twin, 0.0)
    for net, optimizer in ((model, landing), (twin, plain)):
        loss_of(net).backward()
        optimizer.step()
    z = other.lora_B.detach()
    assert torch.allclose(host.lora_B, z - 0.3 * z @ (z.T @ z - torch.eye(3, dtype=z.dtype)), atol=1e-12)
    assert torch.equal(host.lora_C, other.lora_C)


@pytest.mark.parametrize("constraint", ["landing", "cayley"])
def test_a_closure_is_turned_as_well(constraint: str) -> None:
    ends = []
    for closed in (False, True):
        model = adapted()
        landing = Landing(torch.optim.AdamW(trained(model), lr=1e-2), model, constraint=constraint)

        def closure(model: nn.Module = model, landing: Landing = landing) -> Tensor:
            landing.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        if closed:
            assert landing.step(closure).detach() > 0
        else:
            closure()
            assert landing.step() is None
        ends.append(trained(model))
    assert all(torch.equal(first, second) for first, second in zip(*ends))


def test_it_is_the_wrapped_optimiser_for_schedules_checkpoints_and_copies() -> None:
    model = adapted()
    inner = torch.optim.AdamW(trained(model), lr=0.1)
    landing = Landing(inner, model)
    assert isinstance(landing, torch.optim.Optimizer)
    assert (
        landing.param_groups is inner.param_groups
        and landing.state is inner.state
        and landing.defaults is inner.defaults
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(landing, lambda step: 0.5**step)
    calls = []
    landing.register_step_post_hook(lambda *_: calls.append(1))
    for _ in range(2):
        loss_of(model).backward()
        landing.step()
        schedule.step()
        landing.zero_grad()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.025) and len(calls) == 2
    assert all(parameter.grad is None for parameter in trained(model))

    twin = copy.deepcopy(model)
    other = Landing(torch.optim.AdamW(trained(twin), lr=0.1), twin)
    other.load_state_dict(copy.deepcopy(landing.state_dict()))
    pairs = [
        (model, landing),
        (twin, other),
        pickle.loads(pickle.dumps((model, landing))),
        copy.deepcopy((model, landing)),
    ]
    for net, optimizer in pairs:
        loss_of(net, 1).backward()
        optimizer.step()
    for copies in zip(*(trained(net) for net, _ in pairs)):
        assert all(torch.equal(copies[0], copied) for copied in copies[1:])
    extra = nn.Parameter(torch.zeros(2))
    landing.add_param_group({"params": [extra]})
    assert inner.param_groups[-1]["params"][0] is extra


def test_a_gradient_scaler_unscales_first_and_skips_overflows() -> None:
    ends = []
    for scale in (None, 2.0**10):
        model = adapted().float()
        landing = Landing(torch.optim.AdamW(trained(model), lr=1e-2, fused=scale is not None), model, 1.0)
        loss = nn.functional.cross_entropy(model(images(4)), torch.arange(4))
        if scale is None:
            loss.backward()
            landing.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(landing)
            scaler.update()
        ends.append([parameter.detach().clone() for parameter in trained(model)])
    assert all(torch.allclose(first, second, atol=1e-5) for first, second in zip(*ends))
    scaler.scale(model(images(4)).sum() * float("inf")).backward()
    scaler.step(landing)
    assert all(torch.equal(first, second) for first, second in zip(ends[1], trained(model)))


def test_accelerate_prepares_it() -> None:
    model = adapted()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    landing = Landing(torch.optim.SGD(trained(model), lr=0.1), model, 0.9)
    wrapped, prepared = accelerator.prepare(model, landing)
    twin = adapted()
    alone = Landing(torch.optim.SGD(trained(twin), lr=0.1), twin, 0.9)
    for number in range(4):
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, number))
            prepared.step()
            prepared.zero_grad()
        (loss_of(twin, number) / 2).backward()
        if number % 2:
            alone.step()
            alone.zero_grad()
    assert all(torch.allclose(first, second, atol=1e-12) for first, second in zip(trained(model), trained(twin)))


def test_the_method_brings_its_optimiser_with_its_settings(tmp_path: Path) -> None:
    model = adapted(attraction=0.25, constraint="qr")
    inner = torch.optim.SGD(trained(model), lr=0.1)
    whole = nn.ModuleDict({"inside": model, "head": nn.Linear(2, 2)})
    landing = method_optimizer(inner, whole)
    assert (
        isinstance(landing, Landing)
        and (landing.attraction, landing.constraint) == (0.25, "qr")
        and landing.optimizer is inner
    )
    vismt.save_adapter(model, tmp_path)
    loaded = vismt.load_adapter(tiny_vit().double(), tmp_path)
    landing = method_optimizer(torch.optim.SGD(trained(loaded), lr=0.1), loaded)
    assert isinstance(landing, Landing) and (landing.attraction, landing.constraint) == (0.25, "qr")
    # A frozen PoLAR model (a teacher), plain LoRA and stock models keep their optimiser.
    assert method_optimizer(inner, model.requires_grad_(False)) is inner
    other = tiny_vit()
    assert method_optimizer(inner, other) is inner
    vismt.adapt(other, "lora", rank=2)
    assert method_optimizer(inner, other) is inner


def test_mistakes_are_named() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with pytest.raises(UserError, match=r"landing\.attraction: -1; it must be"):
        Landing(optimizer, model, -1)
    with pytest.raises(UserError, match=r"landing\.constraint: 'QR'.*'qr'"):
        Landing(optimizer, model, constraint="QR")
    with pytest.raises(UserError, match=r"the optimiser holds no factor of this model; make it after vismt\.adapt"):
        Landing(torch.optim.SGD(tiny_vit().parameters(), lr=0.1), model)
    other = tiny_vit()
    vismt.adapt(other, "lora", rank=2)
    with pytest.raises(UserError, match="VisionTransformer has no update of PoLAR; adapt it with method 'polar' first"):
        Landing(optimizer, other)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert Landing(prepared, model).optimizer is prepared
    prepared.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UserError, match=r"wrap it before accelerator\.prepare"):
        Landing(prepared, model)


WORKER = """
import sys
import torch
import torch.distributed as dist
file, tests = sys.argv[1:]
sys.path.append(tests)
dist.init_process_group("gloo")
rank = dist.get_rank()
from test_landing import Landing, adapted, loss_of, trained
from vismt.engine.runtime import leave
model = adapted()
wrapped = torch.nn.parallel.DistributedDataParallel(model)
landing = Landing(torch.optim.SGD(trained(model), lr=0.1), model, 0.5)
for step in range(3):
    loss_of(wrapped, step, slice(3 * rank, 3 * rank + 3)).backward()
    landing.step()
    landing.zero_grad()
torch.save(trained(model), f"{file}.{rank}")
del wrapped, landing
leave()
"""


@pytest.mark.slow
def test_two_processes_turn_the_mean_gradient(tmp_path: Path) -> None:
    """With half a batch each, both ranks use the field of the whole batch; that of one half would differ."""
    file = tmp_path / "end"
    run_two("-c", WORKER, file, Path(__file__).parent)
    model = adapted()
    landing = Landing(torch.optim.SGD(trained(model), lr=0.1), model, 0.5)
    for step in range(3):
        loss_of(model, step).backward()
        landing.step()
        landing.zero_grad()
    first, second = (torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2))
    for alone, rank0, rank1 in zip(trained(model), first, second):
        assert torch.equal(rank0, rank1) and torch.allclose(alone, rank0, atol=1e-12)
