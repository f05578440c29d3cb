"""The bound with smoothed labels against draws of the logits, and what separate and unequal losses are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vismt.multitask.nets import Union
from vismt.multitask.objectives import VariationalObjective
from vismt.uncertainty.vbll import VBLLClassifier

UNION = Union(("a", "b"), (2, 3))


class Net(nn.Module):
    """Images are features already."""

    def __init__(self) -> None:
        super().__init__()
        self.head = VBLLClassifier(4, 5, num_train=50, start_std=0.4, start_noise=0.6)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"images": torch.randn(6, 4, 1, 1, generator=generator), "labels": torch.tensor([0, 1, 2, 3, 4, 0])}


def test_without_smoothing_the_loss_is_that_of_the_head() -> None:
    net, data = Net(), batch()
    loss = VariationalObjective(net, (), UNION)(data)["loss"]
    assert torch.allclose(loss, net.head.loss(data["images"].flatten(1), data["labels"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_bounds_the_expected_smoothed_cross_entropy_from_above(smoothing: float) -> None:
    net, data = Net(), batch()
    objective = VariationalObjective(net, (), UNION, label_smoothing=smoothing)
    penalty = (net.head.kl() - net.head.noise_log_prior()) / 50
    bound = objective.entropies(objective.classes(data["images"]), data["labels"], data["labels"])[1] - penalty
    mean, variance = net.head.logit_distribution(data["images"].flatten(1))
    draws = mean + variance.sqrt() * torch.randn(20000, 6, 5, generator=torch.Generator().manual_seed(0))
    target = (1 - smoothing) * torch.eye(5)[data["labels"]] + smoothing / 5
    expected = -(draws.log_softmax(-1) * target).sum(-1).mean(0)
    assert bool((bound > expected).all())
    by_hand = -(target * mean).sum(1) + (mean + variance / 2).logsumexp(1)
    assert torch.allclose(bound, by_hand, atol=1e-5)
