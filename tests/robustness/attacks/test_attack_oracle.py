"""Robust accuracies of a trained CNN against those of the official implementation and of torchattacks on the same images."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.robustness.attacks.attacks import AttackSpec, robust_accuracy
from vismt.storage.paths import data_roots

pytestmark = pytest.mark.realdata
COUNT, CLASSES = 60, 3
LINF, L2 = 40 / 255, 3.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for i, o in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, CLASSES)]
        self.b = nn.Sequential(*layers)

    def forward(self, images):
        return self.b((images - 0.45) / 0.25)


@cache
def oracle():
    """The CNN and its images, as in the README beside its weights."""
    weights = data_roots()[0] / "attack_oracle" / "cnn3.safetensors"
    net = Net()
    net.load_state_dict(load_file(weights))
    card = open_images("fashion_mnist-6000", "test")
    chosen = (card.labels < CLASSES).nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))[:COUNT]]
    return net.eval(), Pixels(card, 32)[chosen], card.labels[chosen]


def robust(name, epsilon, norm="linf", **options):
    """The number of robust images."""
    net, images, labels = oracle()
    spec = AttackSpec(name, epsilon, norm=norm, **options)
    return int(robust_accuracy(net, images, labels, [spec], num_classes=CLASSES).sum())


@pytest.fixture(autouse=True)
def needs_the_oracle():
    root = next(iter(data_roots()), None)
    if root is None or not all((root / name).is_dir() for name in ("attack_oracle", "fashion_mnist")):
        pytest.skip("'attack_oracle' and 'fashion_mnist' are not under VISMT_DATA")


# Numbers of robust images. Official implementation with 5 restarts: the README beside the weights. FAB-T:
# torchattacks 3.5.1, multi_targeted, 5 restarts, measured on these images.
@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "options", "expected", "slack"),
    [
        ("apgd_ce", "linf", LINF, {"restarts": 5}, 9, 1),
        pytest.param("apgd_ce", "l2", L2, {"restarts": 5}, 21, 1, marks=pytest.mark.slow),
        pytest.param("fab", "linf", LINF, {"restarts": 5}, 8, 1, marks=pytest.mark.slow),
        pytest.param("square", "linf", LINF, {"steps": 1000}, 35, 3, marks=pytest.mark.slow),
        ("pgd", "linf", LINF, {"steps": 40, "step_size": LINF / 8, "restarts": 1}, 13, 2),
    ],
)
def test_robust_images_are_those_of_the_references(name, norm, epsilon, options, expected, slack):
    assert abs(robust(name, epsilon, norm, **options) - expected) <= slack


@pytest.mark.parametrize(("norm", "epsilon", "expected"), [("linf", LINF, 26.45), ("l2", L2, 37.9)])
def test_short_pgd_is_that_of_torchattacks_over_the_seeds(norm, epsilon, expected):
    """The start decides up to 4 images of 60; torchattacks 3.5.1: mean of 20 (linf) and 10 (l2) seeds."""
    counts = [robust("pgd_paper", epsilon, norm, seed=seed) for seed in range(6)]
    assert abs(sum(counts) / len(counts) - expected) <= 1
