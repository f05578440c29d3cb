"""`scripts.bench multitask`: A step that balances gradients on adapters, against LibMTL's way on all shared parameters.

A random ViT-S/16, 4 x 224 px, three tasks as LibMTL's NYUv2 (semantic segmentation of 13 classes, depth, normals), PCGrad,
AdamW. Heads are 1x1 convolutions, so that the step is that of the backbone. "vismt, adapters": LoRA r=16 on every linear,
gradients balanced on the factors. "vismt, full": the whole backbone, gradients balanced on all of it. The peer does the same
in the steps of LibMTL (arXiv 2203.14338; LibMTL/weighting/abstract_weighting.py, PCGrad.py): a backward pass for each task
through everything, the gradients of the shared parameters as one vector for each task, projected pair by pair in random order,
and the sum written back. Peak is the largest allocation in the second step, weights included.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from scripts.bench.accounting import peak_bytes, weight_bytes
from scripts.bench.config_memory import made_batch
from scripts.bench.core import training_step
from scripts.bench.timing import PEAK, Ratios, interleave
from vismt.backbones.timm_models import create
from vismt.methods import adapt
from vismt.multitask.balancing.base import make_balancer
from vismt.multitask.heads import make_map_head
from vismt.multitask.nets import DenseNet
from vismt.multitask.objectives import MultitaskObjective
from vismt.multitask.tasks import Task, make_task

MODEL, SIZE, BATCH, CLASSES, RANK, BALANCER = "vit_small_patch16_224", 224, 4, 13, 16, "torchjd:PCGrad"
VISMT, FULL, PEER = "vismt, adapters", "vismt, full", "as LibMTL, full"
TARGET = 0.60  # of time and of memory

Batch = Mapping[str, Tensor]
Step = Callable[[], object]


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Measure a step of each way."""
    where = torch.device(device)
    tasks = [make_task({"name": "semseg", "classes": CLASSES}), make_task("depth"), make_task("normals")]
    net = make_net(MODEL, SIZE, tasks).to(where).train()
    batch = made_batch(tasks, BATCH, (SIZE, SIZE), device)
    return [compare(f"{MODEL}, {BATCH} x {SIZE} px, {len(tasks)} tasks, {BALANCER}", net, tasks, batch, rounds)]


def compare(title: str, net: DenseNet, tasks: Sequence[Task], batch: Batch, rounds: int) -> Ratios:
    """Time a step of each way, and measure its peak."""
    adapted, full = copy.deepcopy(net), copy.deepcopy(net)
    adapted.stock.requires_grad_(False)
    adapt(adapted.stock, "lora", rank=RANK)
    nets = {VISMT: adapted, FULL: full, PEER: net}
    steps = {
        VISMT: step_of(adapted, tasks, batch),
        FULL: step_of(full, tasks, batch),
        PEER: peer_step(net, tasks, batch),
    }
    peaks = {name: weight_bytes(nets[name]) + peak_bytes(step) for name, step in steps.items()}
    timing = interleave(steps, rounds, label=title, device=batch["image"].device)
    return Ratios(
        title, timing, [(VISMT, PEER, TARGET)], sizes={PEAK: peaks}, size_targets=[(PEAK, VISMT, PEER, TARGET)]
    )


def make_net(model: str, size: int, tasks: Sequence[Task]) -> DenseNet:
    """Return a random ViT with a linear head for each task."""
    backbone = create(model, size)
    heads = {task.name: make_map_head("linear", [backbone.width], task.channels) for task in tasks}
    return DenseNet(backbone, heads, [backbone.depth - 1])


def step_of(net: DenseNet, tasks: Sequence[Task], batch: Batch) -> Step:
    """Return a step of vismt that balances the gradients of what is trained in the stock model."""
    shared = [parameter for parameter in net.stock.parameters() if parameter.requires_grad]
    objective = MultitaskObjective(
        net, tasks, balancer=make_balancer(BALANCER, [task.name for task in tasks]), balanced=shared
    )
    return training_step(net, lambda: objective(batch)["loss"])


def peer_step(net: DenseNet, tasks: Sequence[Task], batch: Batch) -> Step:
    """Return a step of LibMTL's kind."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    order = random.Random(0)

    def step() -> None:
        peer_gradients(net, tasks, batch, order)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_gradients(net: DenseNet, tasks: Sequence[Task], batch: Batch, order: random.Random) -> None:
    """Set the gradients of all parameters as LibMTL's PCGrad does: projected ones in the backbone, plain ones in the heads."""
    shared = list(net.stock.parameters())
    sizes = [parameter.numel() for parameter in shared]
    logits = net(batch["image"])
    losses = [
        task.loss_weight * task.loss(task.resized(logits[task.name], batch[task.key].shape[-2:]), batch[task.key])
        for task in tasks
    ]
    rows = torch.zeros(len(tasks), sum(sizes), device=logits[tasks[0].name].device)
    for number, loss in enumerate(losses):
        loss.backward(retain_graph=number < len(losses) - 1)
        for place, parameter in zip(rows[number].split(sizes), shared):
            if parameter.grad is not None:
                place.copy_(parameter.grad.flatten())
                parameter.grad = None
    mixed = rows.clone()
    for row in mixed:
        for other in order.sample(range(len(tasks)), len(tasks)):
            inner = row @ rows[other]
            if inner < 0:
                row -= inner / rows[other].norm() ** 2 * rows[other]
    for parameter, gradient in zip(shared, mixed.sum(0).split(sizes)):
        parameter.grad = gradient.view_as(parameter)
