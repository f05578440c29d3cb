"""`scripts.bench tasks`: Four tasks on one frozen backbone of random weights, 224 px, against a model for each task.

"forward", what four tasks take of an image, on DINOv3's ViT-S/16 and a Swin-T: a pass through a merged model for each task, and
MTLoRA's one pass, its shared pairs merged where they can be. The shared rank is 16, the rank of each task 4. Heads are left out:
every way has the same.

"step", a training step of the Swin-T with linear heads on the last block of each stage, AdamW. "separate": a model for each
task, whole, one after the other; its peak is that of one. "as LibMTL": one whole backbone for all tasks, one backward pass of
the mean of their losses (arXiv 2203.14338, equal weights). Peak is the largest allocation in the second step, weights
included; "weights" are what has to be kept for four tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from scripts.bench.accounting import peak_bytes, weight_bytes
from scripts.bench.core import Step, training_step
from scripts.bench.timing import PEAK, Ratios, interleave
from vismt.lowrank.recompute import recompute
from vismt.methods import adapt
from vismt.multitask.mtlora.method import merge_shared
from vismt.multitask.streams import task_features
from vismt.testing.method_contract import shake

VIT, SWIN = "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"
SIZE, BATCH, RANK, TASK_RANK, OUTPUTS = 224, 2, 16, 4, 8
TASKS = ("semseg", "parts", "saliency", "normals")
MTLORA, PASSES = "vismt mtlora", f"{len(TASKS)} passes"
LESS = f"{MTLORA}, recompute"
SEPARATE, PEER, WEIGHTS = "separate", "as LibMTL", "weights"


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Measure the passes and the steps of each way."""
    import timm

    where = torch.device(device)
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, SIZE, SIZE, device=where)
    models = {name: timm.create_model(name, num_classes=0, img_size=SIZE).to(where) for name in (VIT, SWIN)}
    passes = [forward(name, model.eval(), x, rounds) for name, model in models.items()]
    return [*passes, step(SWIN, models[SWIN].train(), x, rounds)]


@torch.no_grad()
def forward(title: str, model: nn.Module, x: Tensor, rounds: int) -> Ratios:
    """Time the features of all tasks. model: a stock ViT or Swin in eval mode."""
    shared = with_pairs(model)
    shake(shared, 0.02)
    merge_shared(shared)
    ways: dict[str, Callable[[], object]] = {
        MTLORA: lambda: task_maps(shared, x),
        PASSES: lambda: [model(x) for _ in TASKS],
    }
    timing = interleave(ways, rounds, label="forward", device=x.device)
    weights = {MTLORA: weight_bytes(shared), PASSES: len(TASKS) * weight_bytes(model)}
    return Ratios(
        f"{title}, {len(x)} x {x.shape[-1]} px, {len(TASKS)} tasks, forward",
        timing,
        [(MTLORA, PASSES, 0.40)],
        sizes={WEIGHTS: weights},
        size_targets=[(WEIGHTS, MTLORA, PASSES, 0.30)],
    )


def step(title: str, model: nn.Module, x: Tensor, rounds: int) -> Ratios:
    """Time a training step, and measure its peak and the weights. model: a stock Swin in training mode."""
    ours = Net(with_pairs(model), TASKS)
    alone = [Net(copy.deepcopy(model), [task]) for task in TASKS]
    joint = Net(copy.deepcopy(model), TASKS)
    singles = [_step_of(net, x, stage_maps) for net in alone]
    ways: dict[str, Callable[[], object]] = {
        MTLORA: _step_of(ours, x, task_maps),
        LESS: _step_of(ours, x, task_maps, recompute),
        PEER: _step_of(joint, x, stage_maps),
        SEPARATE: lambda: [one() for one in singles],
    }
    own = weight_bytes(ours)
    weights = {MTLORA: own, LESS: own, PEER: weight_bytes(joint), SEPARATE: sum(map(weight_bytes, alone))}
    peaks = {name: weights[name] + peak_bytes(ways[name]) for name in (MTLORA, LESS, PEER)}
    peaks[SEPARATE] = weight_bytes(alone[0]) + peak_bytes(singles[0])
    timing = interleave(ways, rounds, label="step", device=x.device)
    return Ratios(
        f"{title}, {len(x)} x {x.shape[-1]} px, {len(TASKS)} tasks, step",
        timing,
        [(MTLORA, SEPARATE, 0.40), (MTLORA, PEER, 1.0), (LESS, MTLORA, 1.05)],
        sizes={PEAK: peaks, WEIGHTS: weights},
        size_targets=[(PEAK, MTLORA, PEER, 0.60), (PEAK, LESS, PEER, 0.60), (WEIGHTS, MTLORA, SEPARATE, 0.30)],
    )


class Net(nn.Module):
    """A Swin with a linear head for each task and stage."""

    def __init__(self, stock: Any, tasks: Sequence[str]) -> None:
        super().__init__()
        self.stock = stock
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(stage["num_chs"], OUTPUTS) for stage in stock.feature_info) for _ in tasks
        ).to(next(stock.parameters()).device)

    def forward(self, x: Tensor, maps: Callable[..., list[Tensor]]) -> Tensor:
        """Return the mean of the tasks' losses. maps: `stage_maps`, the same for all tasks, or `task_maps`."""
        found = [stage.expand(len(self.heads), *stage.shape[1:]) for stage in maps(self.stock, x)]
        losses = [
            sum(head(stage[task]).square().mean() for head, stage in zip(heads, found))
            for task, heads in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()


def stage_maps(stock: Any, x: Tensor) -> list[Tensor]:
    """Return the outputs (1, b, h, w, d) of the last block of each stage, one for all tasks."""
    maps: list[Tensor] = []
    hooks = [stage.blocks[-1].register_forward_hook(lambda *call: maps.append(call[2][None])) for stage in stock.layers]
    stock.forward_features(x)
    for hook in hooks:
        hook.remove()
    return maps


def task_maps(stock: Any, x: Tensor) -> list[Tensor]:
    """Return those of the tasks (t, b, h, w, d), in one pass."""
    with task_features(TASKS) as features:
        stock.forward_features(x)
    return [rearrange(own, "(t b) ... -> t b ...", t=len(TASKS)) for own in features.own.values()]


def with_pairs(model: nn.Module) -> nn.Module:
    """Return a copy with MTLoRA's pairs."""
    model = copy.deepcopy(model)
    adapt(model, "mtlora", rank=RANK, tasks=TASKS, task_rank=TASK_RANK)
    return model


def _step_of(
    net: Net, x: Tensor, maps: Callable[..., list[Tensor]], context: Callable[[Net], Any] = nullcontext
) -> Step:
    def loss() -> Tensor:
        with context(net):
            return net(x, maps)

    return training_step(net, loss)
