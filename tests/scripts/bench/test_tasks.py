"""The benchmark of several tasks on a tiny Swin: both ways of a step see the same features, and its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scripts.bench import tasks
from scripts.bench.tasks import LESS, MTLORA, PASSES, PEER, SEPARATE
from scripts.bench.timing import PEAK

timm = pytest.importorskip("timm")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 0}
    return timm.create_model(tasks.SWIN, **small, drop_path_rate=0.0)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(1, 3, 56, 56)


def test_at_the_start_the_maps_of_every_task_are_those_of_the_stock_model(model: nn.Module, x: Tensor) -> None:
    stock, ours = tasks.stage_maps(model, x), tasks.task_maps(tasks.with_pairs(model), x)
    assert len(stock) == len(ours) == 2
    for one, of_tasks in zip(stock, ours):
        assert of_tasks.shape == (len(tasks.TASKS), *one.shape[1:])
        assert torch.allclose(of_tasks, one.expand_as(of_tasks), atol=1e-6)
    heads = tasks.Net(model, tasks.TASKS)
    other = tasks.Net(tasks.with_pairs(model), tasks.TASKS)
    other.heads.load_state_dict(heads.heads.state_dict())
    assert torch.allclose(heads(x, tasks.stage_maps), other(x, tasks.task_maps), atol=1e-6)


def test_rows_and_ratios(model: nn.Module, x: Tensor) -> None:
    passes = tasks.forward("tiny", model.eval(), x, 1)
    assert list(passes.timing.seconds) == [MTLORA, PASSES] and "target at most 0.40" in str(passes)
    steps = tasks.step("tiny", model.train(), x, 1)
    assert list(steps.timing.seconds) == [MTLORA, LESS, PEER, SEPARATE] == list(steps.sizes[PEAK])
    assert steps.sizes[PEAK][LESS] < steps.sizes[PEAK][MTLORA]
    assert steps.sizes[tasks.WEIGHTS][SEPARATE] > 3.5 * steps.sizes[tasks.WEIGHTS][PEER]
