"""The reference of `bench amt` computes the same values as vismt, so that the ratio compares equal work."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import shake, snapshot, tiny_vit

from scripts.bench import amt, amt_released
from scripts.bench.__main__ import main
from vismt import adapt
from vismt.backbones.vit import Backbone
from vismt.lowrank.layers.base import adapter_layers
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.objective import AdversarialObjective, Adversary
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.protonet import ProtoNet

CPU = torch.device("cpu")
# A gamma that moves the loss; the grids of 4 and 8 cells divide 16 px.
ADVERSARY = Adversary(support="clean", gamma=0.05)


def backbone():
    # Weights as large as a trained model's: at timm's start attention has almost no effect.
    return shake(Backbone(tiny_vit(num_classes=0)), 0.2)


def nets(init="svd"):
    """A net and its released twin, in fp64: the release recovers the weight attack from a difference of weights."""
    net = ProtoNet(backbone())
    adapt(net.backbone.vit, "amt", rank=3, init=init, alpha=6)
    shake(net.backbone).double()
    return net.double(), amt_released.released_net(net)


def episode(number=3):
    batch = amt.episode(2, 3, 16, CPU, number)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("init", ["svd", "lora"])
def test_the_released_layers_are_the_same_function(init):
    net, twin = nets(init)
    images = episode()["query"]
    assert not adapter_layers(twin) and len(adapter_layers(net)) == 8
    assert torch.allclose(net.backbone(images), twin.backbone(images), rtol=0, atol=1e-9)
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == {
        n for n, p in net.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("number", [0, 3])
def test_the_released_step_has_our_loss_our_gradients_and_our_update(number):
    net, twin = nets()
    batch = episode(number)
    loss = AdversarialObjective(net, ADVERSARY)(batch)["loss"]
    loss.backward()
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    released_loss = amt_released.train_step(twin, optimiser, batch, ADVERSARY)
    assert abs(float(released_loss) - float(loss.detach())) < 1e-5 * float(released_loss)
    parameters = dict(net.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - parameters[name].grad).norm() < 1e-5 * parameters[name].grad.norm(), name
            assert torch.allclose(parameter, before[name] - 0.1 * parameter.grad, rtol=0, atol=1e-12), name
        else:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("change", [{"support": "perturbed"}, {"gamma": 0.0}, {"kl": "adv_clean"}, {"steps": 1}])
def test_the_comparison_would_see_another_form(change):
    net, twin = nets()
    batch = episode()
    loss = AdversarialObjective(net, Adversary(**{**vars(ADVERSARY), **change}))(batch)["loss"]
    released_loss = amt_released.train_step(twin, torch.optim.SGD(twin.parameters(), lr=0.0), batch, ADVERSARY)
    assert abs(float(released_loss) - float(loss.detach())) > 1e-4 * float(released_loss)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("shots", [1, 2])
def test_the_released_task_finds_our_mixture_and_our_prototypes(augment, shots):
    pool = amt.random_pool(backbone(), 4, 3)
    settings = MergeSettings(augment=augment, beta=5.0, seed=1)
    batch = amt.episode(shots, 0, 16, CPU)
    twin = amt_released.released_pool(pool, 3)
    before = snapshot(twin)
    zeta, centres = amt_released.task(twin, batch["support"], batch["support_labels"], settings)
    classifier = PoolNet(pool, settings).classifier(batch["support"], batch["support_labels"])
    assert int((zeta > 0).sum()) == 2 and torch.allclose(classifier.mixture, zeta, rtol=0, atol=1e-5)
    assert torch.allclose(classifier.prototypes, centres, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_experts_of_the_pool_differ():
    pool = amt.random_pool(backbone(), 3, 2)
    batch = amt.episode(2, 0, 16, CPU)
    cosines = PoolNet(pool, MergeSettings()).cosines(batch["support"], batch["support_labels"])
    assert all((cosines[i] - cosines[j]).abs().max() > 1e-4 for i in range(3) for j in range(i))


@pytest.mark.parametrize("what", ["amt", "core", "emtal"])
def test_the_command_runs_the_bench_with_its_options(what, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(f"scripts.bench.{what}.run", lambda *options: calls.append(options) or ["a table"])
    assert not main([what, "--rounds", "3", "--device", "meta"])
    assert calls == [(3, "meta")] and "a table" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_bench_runs_as_a_whole():
    results = amt.run(rounds=1)
    assert len(results) == 6 and all(result.timing.seconds[amt.VISMT] for result in results)
