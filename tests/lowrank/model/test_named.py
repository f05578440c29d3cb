"""Named adapters: errors that leave the model as it was, and models for which carrying an adapter could go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.multitask.emtal.fading import RouterFade
from vismt.multitask.emtal.method import set_fade


def two() -> nn.Module:
    """A ViT with the adapters 'digits' and 'signs', the second active."""
    model = tiny_vit()
    for seed, name in enumerate(("digits", "signs")):
        vismt.adapt(model, "lora", rank=2, seed=seed, name=name)
        shake(model, seed=seed)
    return model


@pytest.mark.parametrize(
    "call,line",
    [
        (lambda m: vismt.activate(m, "digit"), "activate: the model has no adapter 'digit'. Near: 'digits'"),
        (lambda m: vismt.activate(m, "x"), "activate: the model has no adapter 'x'. Known: 'digits', 'signs'"),
        (
            lambda m: vismt.activate(m, ["digits", "signs"]),
            "give one name, or None. vismt.lowrank.combine adds the updates",
        ),
        (lambda m: vismt.remove(m, "x"), "remove: the model has no adapter 'x'"),
        (lambda m: vismt.save_adapter(m, "nowhere", name="x"), "save_adapter: the model has no adapter 'x'"),
        (lambda m: vismt.export_peft(m, "nowhere", name="x"), "export_peft: the model has no adapter 'x'"),
        (
            lambda m: vismt.adapt(m, "lora", name="digits"),
            "already carries 'lora' as adapter 'digits'; remove it first, or",
        ),
        (lambda m: vismt.adapt(m, "lora", name=""), "adapt.name: ''; give a text"),
        (lambda m: vismt.adapt(m, "lora", ["none"], name="new"), "no module matches 'none'"),
        (lambda m: vismt.adapt(m, "pissa", rank=99, name="new"), "adapt.rank: 99"),
        (lambda m: vismt.load_adapter(m, "nowhere", name="new"), "nowhere"),
        (lambda m: vismt.load_adapter(m, "nowhere", name="digits"), "nowhere"),
        (lambda m: vismt.import_peft(m, "nowhere", name="new"), "nowhere"),
        (
            vismt.merge,
            "merge: the model also carries 'digits', made for the weights as they are now; call vismt.remove",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(call, line: str) -> None:
    model = two()
    before, out, flags = snapshot(model), model(images()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError) as error:
        call(model)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(model(images()), out) and [p.requires_grad for p in model.parameters()] == flags
    assert holds(model, before)
    assert not torch.equal(vismt.activate(model, "digits")(images()), out)


WITH_BIAS = {
    "lora": {"rank": 2},
    "s2ft": {"ratio": 0.3},
    "emtal": {"n_experts": 4},
}


@pytest.mark.parametrize("method", WITH_BIAS)
def test_parameters_that_train_along_come_back(method: str, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, also_train=[r"blocks\.0\.mlp\.fc1\.bias"], **WITH_BIAS[method])
    shake(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    out = model(images())
    vismt.save_adapter(model, tmp_path)
    vismt.activate(model, None)
    vismt.activate(model, "default")
    assert torch.allclose(model(images()), out, atol=1e-6)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)
    with vismt.disabled(model):
        pass
    assert torch.allclose(vismt.load_adapter(tiny_vit(), tmp_path)(images()), out, atol=1e-6)
    assert torch.allclose(model(images()), out, atol=1e-6)


def test_what_needs_one_active_adapter() -> None:
    model = two()
    vismt.activate(model, None)
    for call in (vismt.merge, lambda m: vismt.save_adapter(m, "nowhere")):
        with pytest.raises(UserError, match=r"needs one active adapter; call vismt.activate\(model, name\)"):
            call(model)
    for call in (lambda m: vismt.activate(m, "a"), vismt.unadapt, lambda m: vismt.disabled(m).__enter__()):
        with pytest.raises(UserError, match="this model is not adapted"):
            call(tiny_vit())


def test_the_last_adapter_is_merged_as_ever() -> None:
    model = two()
    expected = model(images())
    vismt.merge(vismt.remove(model, "digits"))
    assert torch.allclose(model(images()), expected, atol=1e-5)
    assert list(model.state_dict()) == list(tiny_vit().state_dict())


def test_a_base_that_was_partly_frozen_stays_so() -> None:
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ("a", "b"):
        vismt.adapt(model, "lora", rank=2, name=name)
    vismt.activate(model, None)
    vismt.unadapt(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_sequential_model_runs_with_parked_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(4, 6)
    stock = model(x)
    for seed, name in enumerate("ab"):
        vismt.adapt(model, "lora", ["0", "2"], rank=2, seed=seed, name=name)
        shake(model, seed=seed)
    assert not torch.equal(model(x), stock)
    with vismt.disabled(model):
        assert torch.equal(model(x), stock)


def test_a_router_that_fades_goes_on_after_other_adapters() -> None:
    model = tiny_vit()
    vismt.adapt(model, "emtal", rank=2, n_experts=4, name="routed")
    schedule = RouterFade(10, 0.0, 1.0)
    set_fade(model, schedule)
    schedule.on_step(4)
    shake(model)
    out = model(images())
    vismt.adapt(model, "lora", rank=2, name="plain")
    vismt.activate(model, "routed")
    assert torch.equal(model(images()), out)
    schedule.on_step(8)
    assert model.blocks[0].mlp.fade_value == pytest.approx(0.8) and not torch.equal(model(images()), out)


@pytest.mark.parametrize(
    "method,options", [("lisa", {}), ("pissa", {"quantize": "nf4", "rank": 2}), ("s2ft", {"ratio": 0.3})]
)
def test_methods_that_change_the_weights_themselves(method: str, options: dict, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, name="whole", **options)
    expected = shake(model)(images())
    vismt.adapt(model, "lora", rank=2, name="plain")
    assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)
    assert torch.equal(vismt.activate(model, "whole")(images()), expected)
    vismt.activate(model, "plain")
    vismt.save_adapter(model, tmp_path, name="whole")
    assert torch.equal(vismt.load_adapter(tiny_vit(), tmp_path)(images()), expected)


def test_loading_into_a_parked_adapter_leaves_it_parked(tmp_path: Path) -> None:
    model = two()
    active, saved = model(images()), vismt.save_adapter(model, tmp_path, name="digits")
    expected = vismt.activate(model, "digits")(images())
    shake(model, seed=7)
    vismt.activate(model, "signs")
    vismt.load_adapter(model, saved, name="digits")
    assert torch.equal(model(images()), active)
    assert torch.equal(vismt.activate(model, "digits")(images()), expected)


def test_a_tuner_of_peft_beside_another_adapter() -> None:
    """Its layer is rebuilt from the stock module, and keeps what it learned."""
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2, name="factors")
    shake(model, seed=1)
    vismt.adapt(model, "peft:dora", ["qkv"], rank=2, name="tuner")
    shake(model, seed=2)
    expected = {"tuner": model(images())}
    vismt.activate(model, "factors")
    expected["factors"] = model(images())
    assert not torch.allclose(expected["factors"], expected["tuner"])
    for name in ("tuner", "factors", "tuner"):
        vismt.activate(model, name)
        assert torch.equal(model(images()), expected[name])


def test_an_adapter_that_becomes_active_has_the_mode_of_the_model() -> None:
    model = tiny_vit().train()
    vismt.adapt(model, "peft:lora", ["qkv"], rank=2, lora_dropout=0.5)
    shake(model, seed=1)
    with vismt.disabled(model):
        model.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(images()), model(images()))
