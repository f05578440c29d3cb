"""The reference of `bench emtal` computes the same values as vismt; the compared models differ as described only."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import images, shake, snapshot, tiny_vit
from torch import Tensor, nn

import vismt
from scripts.bench import emtal, emtal_released
from scripts.bench.accounting import saved_activation_bytes
from scripts.bench.emtal_released import released
from scripts.bench.timing import SAVED
from vismt.lowrank.layers.base import adapter_layers
from vismt.multitask.emtal.method import set_fade

LABELS = torch.tensor([0, 3, 4])


def routed(fade: float, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """Weights as large as a trained model's: at timm's start attention and router have almost no effect."""
    model = shake(tiny_vit(), 0.2)
    vismt.adapt(model, "emtal", rank=2, **{"n_experts": 4, "cluster": False, "also_train": ["head"], **options})
    set_fade(model, fade)
    return shake(model, 0.2, seed=3).to(dtype)


def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients by vismt's names and in its layout; the release's factors A (i, r), B (r, o) are transposed."""
    model.zero_grad()
    emtal.loss_of(model, images().to(dtype), LABELS).backward()
    by_name = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace("mlp.router", "mlp.lora_router").replace("lora_a", "lora_A").replace("lora_b", "lora_B")
            by_name[key] = parameter.grad if key == name or "router" in name else parameter.grad.t()
    return by_name


def gap(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).detach().norm() / reference.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("fade", [0.0, 0.25, 0.5, 1.0])
def test_the_release_has_our_logits_and_our_gradients(fade: float, dtype: torch.dtype, near: float) -> None:
    model = routed(fade, dtype)
    before = snapshot(model)
    twin = released(model)
    assert len(adapter_layers(model)) == 8 and not adapter_layers(twin)
    assert gap(model(images().to(dtype)), twin(images().to(dtype))) < near
    grads, released_grads = gradients(model, dtype), gradients(twin, dtype)
    assert set(grads) == set(released_grads) and len(grads) == 2 * (4 * 2 + 1) + 2
    for name, grad in grads.items():
        assert gap(grad, released_grads[name]) < near, name
    assert grads["blocks.0.mlp.lora_router.weight"].any() == (fade < 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_units_that_are_ordered_by_expert_and_another_scale_are_followed() -> None:
    model = routed(0.25, cluster=True, alpha=6.0)
    assert not model.blocks[0].mlp.labels.equal(model.blocks[0].mlp.labels.sort().values)
    assert gap(model(images()), released(model)(images())) < 1e-5


def dealt(weights: Tensor, hidden: int) -> Tensor:
    return weights.repeat(1, 1, hidden // weights.shape[-1])


def test_the_layout_h_modulo_k_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(0.25)
    twin, grads = released(model), gradients(model, torch.float32)
    units = emtal_released.spread(torch.tensor([[[1.0, 2.0]]]), 6)[0, 0].tolist()
    monkeypatch.setattr(emtal_released, "spread", dealt)
    assert (units, dealt(torch.tensor([[[1.0, 2.0]]]), 6)[0, 0].tolist()) == ([1, 1, 1, 2, 2, 2], [1, 2, 1, 2, 1, 2])
    assert gap(model(images()), twin(images())) > 1e-2
    released_grads = gradients(twin, torch.float32)
    assert all(gap(grad, released_grads[name]) > 1e-2 for name, grad in grads.items() if "router" in name)


def test_another_fade_is_another_function() -> None:
    model = routed(0.25)
    twin = released(model)
    set_fade(model, 0.5)
    assert gap(model(images()), twin(images())) > 1e-2


def test_the_release_keeps_what_it_spreads() -> None:
    model = routed(0.25)
    twin = released(model)
    saved = saved_activation_bytes(model, lambda: model(images()))
    saved_by_release = saved_activation_bytes(twin, lambda: twin(images()))
    # Of both blocks, fp32: pre-activations and the spread weights are kept with the product.
    hidden = 2 * 3 * 17 * 128 * 4
    assert saved_by_release - saved > 2 * hidden


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(emtal, "EXPERTS", 4)
    return tiny_vit()


def test_forms_are_one_model_before_and_after_its_merge(small: nn.Module) -> None:
    forms = emtal.forms(small)
    stock, merged = forms[emtal.STOCK], forms[emtal.MERGED]
    assert list(stock.state_dict()) == list(merged.state_dict()) == list(small.state_dict())
    assert [type(module) for module in stock.modules()] == [type(module) for module in merged.modules()]
    assert gap(forms[emtal.FADED](images()), merged(images())) < 1e-5
    assert gap(merged(images()), stock(images())) > 1e-3 < gap(forms[emtal.HALF](images()), merged(images()))
    assert not any(form.training for form in forms.values())
    assert {form.blocks[0].mlp.fade_value for name, form in forms.items() if name in (emtal.FADED, emtal.HALF)} == {
        1.0,
        0.5,
    }


def test_trainees_train_the_same_linears_and_the_head(small: nn.Module) -> None:
    nets = emtal.trainees(small)
    counts = {name: sum(p.numel() for p in net.parameters() if p.requires_grad) for name, net in nets.items()}
    routers = 2 * 32 * 4
    assert counts[emtal.ROUTED] == counts[emtal.RELEASED] == counts[emtal.PLAIN] + routers
    assert list(adapter_layers(nets[emtal.ROUTED])) == list(adapter_layers(nets[emtal.PLAIN]))
    assert all(net.training and net.head.weight.requires_grad for net in nets.values())
    assert nets[emtal.ROUTED].blocks[0].mlp.fade_value == nets[emtal.RELEASED].blocks.fade == emtal.FADE


def test_steps_of_the_release_and_of_ours_stay_together(small: nn.Module) -> None:
    nets = emtal.trainees(small)
    steps = {name: emtal.step_of(net, images(), LABELS) for name, net in nets.items()}
    before = {name: snapshot(net) for name, net in nets.items()}
    losses = {name: [float(step()) for _ in range(4)] for name, step in steps.items()}
    assert all(values[-1] < values[0] for values in losses.values())
    assert losses[emtal.RELEASED] == pytest.approx(losses[emtal.ROUTED], rel=1e-5)
    for name, net in nets.items():
        trained = {key for key, p in net.named_parameters() if p.requires_grad}
        moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[name][key])}
        assert moved == trained, name


@pytest.mark.slow
def test_bench_runs_as_a_whole() -> None:
    forward, training = emtal.run(rounds=1)
    assert forward.timing.seconds[emtal.MERGED] and not forward.sizes
    saved = training.sizes[SAVED]
    assert saved[emtal.ROUTED] < 1.02 * saved[emtal.PLAIN] < saved[emtal.RELEASED]
