"""What `bench attacks` times beside ours gives the same outcome, so that the ratios compare equal work."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import attacks
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.protocol.protocol import run_protocol
from vismt.robustness.attacks import attacks as engine
from vismt.robustness.attacks.attacks import AttackSpec, robust_accuracy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    return attacks.trained(False, CPU), *attacks.patterns(8, 1)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(engine, "QUERIES", {"autoattack": 60})
    monkeypatch.setattr(attacks, "QUERIES", 60)


@pytest.mark.slow
def test_all_three_autoattacks_leave_the_same_images(case, short):
    pytest.importorskip("torchattacks")
    net, images, labels = case
    spec = AttackSpec("autoattack", 1.6 / 255, steps=5)
    ours = robust_accuracy(net, images, labels, [spec], num_classes=attacks.CLASSES)
    assert 0 < ours.sum() < len(images)
    assert torch.equal(attacks.in_turn(net, images, labels, spec), ours)
    assert torch.equal(attacks.by_torchattacks(net, images, labels, spec), ours)


def test_in_turn_runs_every_trial_to_its_end(case, short):
    net, images, labels = case
    counted = []
    hook = net.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    spec = AttackSpec("autoattack", 0.1, steps=10)
    assert not attacks.in_turn(net, images, labels, spec).any()
    # A clean pass, then a start and ten steps of APGD-CE on all images that are right, which an early step breaks.
    assert counted[0] == len(images) and counted[1:] == [int((net(images).argmax(1) == labels).sum())] * 11
    counted.clear()
    assert not robust_accuracy(net, images, labels, [spec], num_classes=attacks.CLASSES).any()
    hook.remove()
    assert sum(counted) < 4 * len(images)


def test_both_protocols_find_the_same_accuracy_when_clean(monkeypatch):
    pytest.importorskip("torchattacks")
    monkeypatch.setattr(attacks, "EPISODES", 3)
    net, (images, labels) = attacks.prototypes(CPU), attacks.patterns(200, 2)
    sampler, spec = EpisodeSampler(labels, ways=5, shots=5, queries=4, seed=0), AttackSpec("pgd_paper", 4 / 255)
    ours = run_protocol(net, images, sampler, episodes=3, attacks=[spec])
    theirs = list(attacks.one_by_one(net, images, sampler, spec, CPU))
    assert [float(clean.double().mean()) for clean, _ in theirs] == ours["clean"].tolist()
    attacked = torch.stack([under.double().mean() for _, under in theirs])
    assert attacked.mean() < ours["clean"].mean() and (attacked - ours[str(spec)]).abs().max() <= 0.1
