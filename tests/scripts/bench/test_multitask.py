"""The peer of `bench multitask` balances as vismt does, and every way trains; both on a tiny ViT."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from scripts.bench import multitask
from scripts.bench.config_memory import made_batch
from scripts.bench.multitask import FULL, PEER, VISMT
from scripts.bench.timing import PEAK
from vismt.multitask.balancing.base import make_balancer
from vismt.multitask.nets import DenseNet
from vismt.multitask.objectives import MultitaskObjective
from vismt.multitask.tasks import Task, make_task


@pytest.fixture
def tasks() -> list[Task]:
    return [make_task({"name": "semseg", "classes": multitask.CLASSES}), make_task("normals")]


@pytest.fixture
def net(tasks: list[Task]) -> DenseNet:
    return multitask.make_net("test_vit", 32, tasks)


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def test_the_peer_and_vismt_find_the_same_gradients(net: DenseNet, tasks: list[Task]) -> None:
    """With two tasks the order of the pairs does not matter. Heads and targets pull the features apart: a conflict."""
    batch = {**made_batch(tasks, 2, (32, 32)), "semseg": torch.zeros(2, 32, 32, dtype=torch.int64)}
    batch["normals"] = torch.tensor([1.0, 0, 0])[:, None, None].expand(2, 3, 32, 32)
    with torch.no_grad():
        net.heads["normals"].predict.weight[0].copy_(-net.heads["semseg"].predict.weight[0])
    other = copy.deepcopy(net)
    multitask.peer_gradients(net, tasks, batch, random.Random(0))
    pytest.importorskip("torchjd")
    balancer = make_balancer(multitask.BALANCER, [task.name for task in tasks])
    MultitaskObjective(other, tasks, balancer=balancer, balanced=list(other.stock.parameters()))(batch)[
        "loss"
    ].backward()
    assert all(value > 1 for value in balancer.last_alpha().values())  # each was projected
    peer, ours = gradients(net), gradients(other)
    assert peer.keys() >= ours.keys() and all(not peer[name].any() for name in peer.keys() - ours.keys())
    for name, value in ours.items():
        assert (value - peer[name]).abs().max() <= 1e-3 * peer[name].abs().max(), name


def test_rows_and_ratios(net: DenseNet, tasks: list[Task]) -> None:
    pytest.importorskip("torchjd")
    result = multitask.compare("tiny", net, tasks, made_batch(tasks, 2, (32, 32)), 2)
    assert list(result.timing.seconds) == [VISMT, FULL, PEER] == list(result.sizes[PEAK])
    assert result.sizes[PEAK][VISMT] < result.sizes[PEAK][PEER]
    share = result.sizes[PEAK][VISMT] / result.sizes[PEAK][PEER]
    assert f"peak memory of {VISMT} / {PEER}: {share:.3f}" in str(result) and "target at most 0.60" in str(result)
