"""PoLAR as a method: its start, language models, and the exact change of gauge."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import Landing, orthonormalize_
from vismt.llm.polar import landing
from vismt.llm.polar.landing import updates
from vismt.llm.polar.stiefel import infeasibility
from vismt.lowrank.layers.base import adapter_layers

THETAS = ["full", "diagonal"]
TOKENS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 6]])


def llama() -> nn.Module:
    from helpers.language_models import random_lm  # skips the test where transformers is missing

    return random_lm("llama", num_key_value_heads=1)


def gpt2() -> nn.Module:
    from helpers.language_models import random_lm

    return random_lm("gpt2")


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("split", [False, True])
def test_start_is_on_the_manifold_and_computes_the_same_bits(theta: str, split: bool) -> None:
    original = tiny_vit().double()
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=5, split_qkv=split, theta=theta)
    count = 0
    for host in adapter_layers(model).values():
        assert not host.lora_C.any() and not host.low_rank().delta().any()
        for x, _, y in updates(host):
            count += 1
            assert infeasibility(x) < 1e-20 and infeasibility(y) < 1e-20  # squared norm
    assert count == 2 * (6 if split else 4)
    assert torch.equal(model(images().double()), original(images().double()))
    # No two factors of one shape are equal, also within a fused projection.
    flat = [x for host in adapter_layers(model).values() for x, _, _ in updates(host) if x.shape == (32, 5)]
    assert len(flat) > 3 and all(not torch.equal(flat[0], other) for other in flat[1:])


def test_first_gradient_reaches_theta_alone() -> None:
    model = tiny_vit()
    vismt.adapt(model, "polar", rank=3)
    model(images()).square().sum().backward()
    for host in adapter_layers(model).values():
        assert host.lora_C.grad.abs().sum() > 0
        assert not host.lora_A.grad.any() and not host.lora_B.grad.any()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("theta", THETAS)
def test_language_models(make, theta: str, tmp_path) -> None:
    model = make()
    original = model(TOKENS).logits
    report = vismt.adapt(model, "polar", rank=3, alpha=12.0, theta=theta)
    if make is llama:
        assert {site.shape for site in report.specs} >= {(32, 32), (8, 32), (48, 32), (32, 48)}
    else:
        assert {site.kind for site in report.specs} == {"conv1d"}
    assert torch.equal(model(TOKENS).logits, original)
    moved = shake(model)(TOKENS).logits.detach()
    assert (moved - original).abs().max() > 1e-2
    vismt.save_adapter(model, tmp_path / "own")
    assert torch.equal(vismt.load_adapter(make(), tmp_path / "own")(TOKENS).logits, moved)
    vismt.merge(model)
    assert torch.allclose(model(TOKENS).logits, moved, atol=1e-5)
    assert list(model.state_dict()) == list(make().state_dict())


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("split", [False, True])
def test_orthonormalize_changes_the_gauge_and_not_the_function(theta: str, split: bool) -> None:
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=4, split_qkv=split, theta=theta)
    shake(model, 0.3)
    before = model(images().double())
    deltas = {path: host.low_rank().delta() for path, host in adapter_layers(model).items()}
    off = [
        float(infeasibility(z)) for host in adapter_layers(model).values() for x, _, y in updates(host) for z in (x, y)
    ]
    assert min(off) > 0.01
    assert orthonormalize_(model) is model
    assert torch.allclose(model(images().double()), before, atol=1e-12)
    for path, host in adapter_layers(model).items():
        old, new = deltas[path], host.low_rank().delta()
        assert torch.allclose(new, old, atol=1e-12 * float(old.abs().max()) + 1e-13)
        for x, core, y in updates(host):
            assert infeasibility(x) < 1e-20 and infeasibility(y) < 1e-20
            # The stable rank of the update is now that of Theta.
            values = torch.linalg.svdvals(torch.diag(core) if theta == "diagonal" else core)
            whole = torch.linalg.svdvals(x @ (torch.diag(core) if theta == "diagonal" else core) @ y.T)
            ratio = float(values.square().sum() / values[0] ** 2)
            assert ratio == pytest.approx(float(whole.square().sum() / whole[0] ** 2)) and 1 <= ratio <= 4


def test_orthonormalize_writes_into_sharded_factors(monkeypatch) -> None:
    """Of a sharded factor `whole` returns a gathered copy, which `write_whole` spreads again."""
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=4)
    shake(model, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(landing, "whole", torch.clone)
        patch.setattr(landing, "write_whole", lambda target, value: target.copy_(value))
        orthonormalize_(model)
    assert all(infeasibility(z) < 1e-20 for host in adapter_layers(model).values() for z in next(updates(host))[::2])


def test_logged_metrics_are_those_of_the_updates() -> None:
    model = tiny_vit().double()
    vismt.adapt(model, "polar", rank=3)
    shake(model, 0.2)
    landing = Landing(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)
    metrics = landing.metrics()
    hosts = adapter_layers(model).values()
    off = [infeasibility(z) for host in hosts for x, _, y in updates(host) for z in (x, y)]
    assert float(metrics["infeasibility"]) == pytest.approx(float(sum(off) / len(off)))
    ranks = [host.low_rank().stable_rank() for host in hosts]  # by QR and SVD of the whole update
    assert float(metrics["stable_rank"]) == pytest.approx(sum(ranks) / len(ranks), rel=1e-9)
    orthonormalize_(model)
    metrics = landing.metrics()
    assert float(metrics["infeasibility"]) < 1e-20 and float(metrics["stable_rank"]) == pytest.approx(
        sum(ranks) / len(ranks)
    )


def test_bf16_base_keeps_fp32_factors_on_the_manifold() -> None:
    model = llama().to(torch.bfloat16)
    vismt.adapt(model, "polar", rank=3)
    for host in adapter_layers(model).values():
        assert host.lora_A.dtype == host.lora_B.dtype == host.lora_C.dtype == torch.float32
        assert infeasibility(host.lora_B.detach()) < 1e-10
    moved = shake(model)(TOKENS).logits
    assert moved.dtype == torch.bfloat16 and torch.isfinite(moved).all()
    assert torch.allclose(
        vismt.merge(model)(TOKENS).logits.float(), moved.float(), atol=2e-2 * float(moved.detach().abs().max())
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"theta": "diag"}, r"adapt\.theta: 'diag'.*'diagonal'"),
        ({"attraction": -1.0}, r"adapt\.attraction: -1\.0; it must be a number >= 0"),
        ({"attraction": "much"}, r"adapt\.attraction: 'much'"),
        ({"attraction": float("nan")}, r"adapt\.attraction: nan"),
        ({"attraction": True}, r"adapt\.attraction: True"),
        ({"attraction": 2.0, "constraint": "decoupled"}, r"adapt\.attraction: 2\.0;.*at most 1"),
        ({"constraint": "landed"}, r"adapt\.constraint: 'landed'.*'landing'"),
        ({"rank": 40}, r"adapt\.rank: 40 .* larger than 32"),
        ({"atraction": 1.0}, "no option 'atraction'.*'attraction'"),
    ],
)
def test_mistakes_are_named_and_change_nothing(options: dict, message: str) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=message):
        vismt.adapt(model, "polar", **options)
    assert not adapter_layers(model) and not hasattr(model, "vismt_record")
