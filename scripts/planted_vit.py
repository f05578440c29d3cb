"""Train a small ViT whose FFNs have a group of hidden units for each of several tasks: the premise of EMTAL's router, planted.

    python -m scripts.planted_vit FILE [--steps 1500] [--seed 0]

    v = act(u * omega_t),  omega_t = T on the units of group t, 0 on the others,  u = W_up x + b_up

The network is timm's test_vit at 64 px (6 blocks of width 64, 192 hidden units), the tasks are MNIST, Fashion-MNIST and CIFAR-10,
and the task of a training image is known. Every group's rows of W_up start around a direction of its own, and the units lie in
random order, so that clustering has something to find and something to do. omega_t is what a router that is sure of the task
computes; a uniform router lets all groups in, which training never saw. FILE takes the weights (safetensors, without a head), for
configs/multitask/emtal_planted.yaml. The command prints the accuracy with the right group and with all groups, and the share of
units that clusters place with their group.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vismt.base import console
from vismt.data.images import open_images
from vismt.data.pixels import crop_square
from vismt.multitask.emtal.clusters import cluster_neurons, random_neurons

TASKS = ("mnist-4000", "fashion_mnist-6000", "cifar10-6000")
CLASSES, SIZE, BATCH, RATE = 10, 64, 128, 2e-3
SHARED = 0.7  # of a row's variance at the start, the part along its group's direction


class Planted(nn.Module):
    """A ViT with a head of `CLASSES` for each task; `task` chooses the units that run, None lets all run.

    groups: int64 (blocks, hidden), the task of each hidden unit.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.task: int | None = None
        self.vit = timm.create_model("test_vit", img_size=SIZE, num_classes=0)
        self.heads = nn.ModuleList(nn.Linear(self.vit.num_features, CLASSES) for _ in TASKS)
        mlps: list[Any] = [block.mlp for block in self.vit.blocks]
        units = mlps[0].fc1.out_features
        self.groups = torch.stack([random_neurons(units, len(TASKS), 1000 * seed + k) for k in range(len(mlps))])
        for mlp, groups in zip(mlps, self.groups):
            with torch.no_grad():
                rows = mlp.fc1.weight
                directions = nn.functional.normalize(torch.randn(len(TASKS), rows.shape[1]), dim=1)
                planted = directions[groups] * rows.norm(dim=1, keepdim=True)
                rows.copy_(SHARED**0.5 * planted + (1 - SHARED) ** 0.5 * rows)
            mlp.act.register_forward_pre_hook(lambda _, inputs, groups=groups: (inputs[0] * self.omega(groups),))

    def omega(self, groups: Tensor) -> Tensor:
        """Return the weight of each unit (hidden,)."""
        return torch.ones(len(groups)) if self.task is None else len(TASKS) * (groups == self.task).float()

    def forward(self, images: Tensor, task: int, routed: bool = True) -> Tensor:
        """Return the scores (b, CLASSES) of one task for uint8 images (b, 3, SIZE, SIZE)."""
        self.task = task if routed else None
        return self.heads[task](self.vit(images / 127.5 - 1))


def train(model: Planted, data: list[tuple[Tensor, Tensor]], steps: int, seed: int) -> None:
    """Train on one task a step, in turn. data: images uint8 (n, 3, SIZE, SIZE) and labels int64 (n,) of each task."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        task = step % len(TASKS)
        images, labels = data[task]
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen], task), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 < len(TASKS):
            console.stage("train", f"step {step}   {TASKS[task]}   loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: Planted, data: list[tuple[Tensor, Tensor]], routed: bool) -> str:
    """Return the accuracy of each task in %, as a text."""
    shares = []
    for task, (images, labels) in enumerate(data):
        right = torch.cat([model(part, task, routed).argmax(1) for part in images.split(500)]) == labels
        shares.append(f"{TASKS[task]} {100 * right.float().mean().item():.1f}")
    return ", ".join(shares)


def agreement(labels: Tensor, groups: Tensor) -> float:
    """Return the share of units that lie in the cluster of their group, under the best naming of the clusters."""
    namings = itertools.permutations(range(len(TASKS)))
    return max(float((torch.tensor(naming)[labels] == groups).float().mean()) for naming in namings)


def loaded(split: str) -> list[tuple[Tensor, Tensor]]:
    """Return images and labels of each task."""
    sets = [open_images(name, split) for name in TASKS]
    return [
        (torch.stack([crop_square(images.read(i), SIZE) for i in range(len(images))]), images.labels) for images in sets
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m scripts.planted_vit", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the weights, .safetensors")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, test = Planted(options.seed), loaded("test")
    train(model.train(), loaded("train"), options.steps, options.seed)
    model.eval()
    console.stage("accuracy", f"right group: {accuracy(model, test, True)}")
    console.stage("accuracy", f"all groups: {accuracy(model, test, False)}")
    shares = [
        agreement(cluster_neurons(block.mlp.fc1.weight, len(TASKS)), groups)
        for block, groups in zip(model.vit.blocks, model.groups)
    ]
    console.stage("clusters", "units in the cluster of their group: " + ", ".join(f"{share:.2f}" for share in shares))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.vit.state_dict(), options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
