"""Parts of the tests of attacks: class patterns, and a small CNN trained on them for a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.seeds import mix_seed
from vismt.robustness.attacks.attacks import AttackSpec

CLASSES, SIDE, COUNT = 5, 12, 60
KEYS = [(3, i) for i in range(COUNT)]


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images (count, 3, SIDE, SIDE) in [0, 1] of CLASSES patterns, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return (0.5 + 0.5 * (means[labels] - 0.5) + 0.15 * noise).clamp(0, 1), labels


@cache
def victim_case() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a smooth CNN in double precision, COUNT images that it has not seen, and their labels."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 12, 3, 2, 1), nn.GELU(), nn.Conv2d(12, 24, 3, 2, 1), nn.GELU()]
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(216, CLASSES))
    images, labels = patterns(256, 1)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(net(images + 0.1 * torch.randn_like(images)), labels).backward()
        optimiser.step()
    return net.double().eval().requires_grad_(False), *patterns(COUNT, 2)


def survivors(spec: AttackSpec) -> Tensor:
    """Return which of the images withstand an attack, bool (COUNT,)."""
    net, images, labels = victim_case()
    result = spec.perturb(net, images, labels, num_classes=CLASSES, keys=KEYS)
    return (net(result.double()).argmax(1) == labels) & (net(images.double()).argmax(1) == labels)


def seeds_of(spec: AttackSpec, restart: int = 0) -> list[int]:
    """Return the seed that an attack gives to each image in a restart."""
    return [mix_seed(mix_seed(*key), f"{spec.name} {spec.seed}", restart) for key in KEYS]


def worst_iterates(trajectory: list[Tensor]) -> Tensor:
    """Return which images are right when clean and in every iterate of a reference loop, bool (COUNT,)."""
    net, images, labels = victim_case()
    return torch.stack([net(step.double()).argmax(1) == labels for step in (images, *trajectory)]).all(0)


class Float(nn.Module):
    """The net of `victim_case` in the form that torchattacks needs: float32, with a parameter that tells the device."""

    def __init__(self) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.zeros(()))
        self.net = victim_case()[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double()).float()


def torchattacks_survivors(name: str, **options: object) -> Tensor:
    """Return which of the images withstand a class of torchattacks, bool (COUNT,)."""
    torchattacks = pytest.importorskip("torchattacks")
    net, images, labels = Float().eval(), *victim_case()[1:]
    result = getattr(torchattacks, name)(net, **options)(images, labels)
    with torch.no_grad():
        return (net(result).argmax(1) == labels) & (net(images).argmax(1) == labels)


class Channels(nn.Module):
    """Weighted mean of each channel: an attack cannot use a channel of weight zero."""

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.weight - 0.5 * self.weight


class Colours:
    """Twelve images of each of five colours, with noise."""

    labels = torch.arange(5).repeat_interleave(12)

    def __init__(self, noise: float, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        colours = torch.rand(5, 3, 1, 1, generator=generator)
        drawn = torch.randn(60, 3, side, side, generator=generator)
        self.images = (colours[self.labels] + noise * drawn).clamp(0, 1)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[index]
