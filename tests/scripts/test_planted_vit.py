"""The planted ViT has the premise that its study is about: disjoint groups that the task chooses and that clusters find."""

from __future__ import annotations

import pytest
import torch

from scripts.planted_vit import SIZE, TASKS, Planted, agreement
from vismt.multitask.emtal.clusters import cluster_neurons, random_neurons


@pytest.fixture(scope="module")
def model() -> Planted:
    return Planted(seed=0).eval()


def test_a_task_runs_its_own_units_alone(model: Planted) -> None:
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = [(model(images, task), model(images, task, routed=False)) for task in range(len(TASKS))]
    assert not torch.allclose(before[0][0], before[0][1])
    with torch.no_grad():
        model.vit.blocks[2].mlp.fc1.weight[model.groups[2] == 1] += 1.0
    routed, whole = zip(*((model(images, task), model(images, task, routed=False)) for task in range(len(TASKS))))
    assert torch.equal(routed[0], before[0][0]) and torch.equal(routed[2], before[2][0])
    assert not torch.allclose(routed[1], before[1][0]) and not torch.allclose(whole[0], before[0][1])


def test_clusters_find_the_planted_groups_and_chance_does_not() -> None:
    model = Planted(seed=1)
    for block, groups in zip(model.vit.blocks, model.groups):
        assert groups.bincount().tolist() == [64, 64, 64]
        assert agreement(cluster_neurons(block.mlp.fc1.weight, len(TASKS)), groups) > 0.98
        assert agreement(random_neurons(192, len(TASKS), 5), groups) < 0.5
