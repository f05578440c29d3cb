"""Parts of the tests of AMT: a small backbone, two domains of drawn images, episodes, expert folders."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.tiny import shake, tiny_vit
from vismt import adapt
from vismt.backbones.vit import Backbone
from vismt.lowrank.files.save_load import save_adapter
from vismt.metatune.amt.method import AdversarialObjective, Adversary
from vismt.metatune.amt.pool import Expert
from vismt.metatune.protonet import ProtoNet

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)


def backbone(seed: int = 0, **options: object) -> Backbone:
    """Return a backbone with weights as large as a trained model's: at timm's start attention has almost no effect."""
    vit = tiny_vit(seed, num_classes=0, **options)
    return shake(Backbone(vit, mean=MEAN, std=STD), 0.2, seed + 2).requires_grad_(True).eval()


def adapted(rank: int = 2, seed: int = 0, **options: object) -> ProtoNet:
    """Return an untrained expert."""
    net = backbone()
    adapt(net.vit, "amt", rank=rank, seed=seed, **options)
    return ProtoNet(net)


def drawn(labels: Tensor, seed: int, domain: str = "texture", size: int = 16) -> Tensor:
    """Draw images (n, 3, size, size) of classes 0..5: gratings of six directions, or six shapes at random places."""
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    if domain == "texture":
        angle = (labels * math.pi / 6).view(-1, 1, 1)
        phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
        plane = ((rows * angle.sin() + columns * angle.cos()) * 1.5 + phase).sin()
    else:
        y, x = (size * (0.35 + 0.3 * torch.rand(count, 1, 1, generator=generator)) for _ in range(2))
        down, right, reach = (rows - y).abs(), (columns - x).abs(), size / 4
        disc, box = down.square() + right.square() < reach**2, torch.maximum(down, right) < reach
        kinds = [box, box & ~disc, (down < 2) | (right < 2), down < 2, right < 2, (down - right).abs() < 2]
        plane = 2 * torch.stack(kinds, 1)[torch.arange(count), labels].float() - 1
    strength = 0.15 + 0.1 * torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return (0.5 + strength * plane[:, None] + noise).clamp(0, 1)


def episode(number: int, seed: int = 0, domain: str = "texture", **sizes: int) -> dict[str, Tensor]:
    """Return an episode in the form of a batch of `EpisodeBatches`."""
    ways, shots, queries = (sizes.get(name, value) for name, value in (("ways", 3), ("shots", 2), ("queries", 4)))
    draw_seed = 1_000_003 * seed + 2 * number
    classes = torch.randperm(6, generator=torch.Generator().manual_seed(draw_seed))[:ways]
    first, second = torch.arange(ways).repeat_interleave(shots), torch.arange(ways).repeat_interleave(queries)
    return {
        "support": drawn(classes[first], draw_seed, domain),
        "support_labels": first,
        "query": drawn(classes[second], draw_seed + 1, domain),
        "query_labels": second,
        "number": torch.tensor(number),
    }


def train(proto: ProtoNet, adversary: Adversary, steps: int, lr: float = 0.02, domain: str = "texture") -> ProtoNet:
    """Train with SGD and momentum on `steps` episodes."""
    objective = AdversarialObjective(proto, adversary)
    optimiser = torch.optim.SGD([p for p in proto.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for number in range(steps):
        optimiser.zero_grad()
        objective(episode(number, 0, domain))["loss"].backward()
        nn.utils.clip_grad_norm_(proto.parameters(), 1.0)
        optimiser.step()
    return proto


def saved(
    folder: Path, moves: tuple[int | None, ...] = (None, 3, 4), *, rank: int = 2, **options: object
) -> list[Expert]:
    """Save experts with the labels "0", "1", ... in folders; `moves` are seeds of changes to their factors, None for none."""
    experts = []
    for number, move in enumerate(moves):
        proto = adapted(rank, **options)
        if move is not None:
            shake(proto.backbone.vit, 0.05, move)
        experts.append(Expert(str(number), save_adapter(proto.backbone.vit, folder / str(number)), 10.0 + number))
    return experts


def same(tensors: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two dicts of tensors have equal names and equal bits."""
    return set(tensors) == set(other) and all(torch.equal(tensors[name], other[name]) for name in tensors)
