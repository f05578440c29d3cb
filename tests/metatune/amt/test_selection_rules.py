"""The rules that weight a pool's experts: each by hand, and what all of them have in common on a pool."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import backbone, episode, saved
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.metatune import features
from vismt.metatune.amt import selection_rules
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import Expert, ExpertPool
from vismt.metatune.amt.selection_rules import (
    RULES,
    MergeSettings,
    SupportTask,
    best_expert,
    held_out_cosines,
    leave_one_out,
    ridge_weights,
)

LABELS = torch.tensor([0, 0, 1, 1])


class Reads(nn.Module):
    """Features (mean of one channel - 0.5, 0.01): an angle that says on which side of 0.5 the channel is."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, images: Tensor) -> Tensor:
        value = images[:, self.channel].mean((1, 2)) - 0.5
        return torch.stack([value, torch.full_like(value, 0.01)], 1)


def painted(*channels: list[float]) -> Tensor:
    """Images (s, 3, 8, 8) whose channels have constant values."""
    values = torch.full((len(channels[0]), 3), 0.5)
    for number, channel in enumerate(channels):
        values[:, number] = torch.tensor(channel)
    return values[:, :, None, None].expand(-1, -1, 8, 8).clone()


def given(features: Tensor, labels: Tensor) -> SupportTask:
    """A task whose experts have the features (P, s, d) on the support and nothing else."""
    task = SupportTask([nn.Identity()] * len(features), torch.zeros(len(labels), 3, 8, 8), labels)
    task.__dict__["clean"] = features
    return task


# ---- leave-one-out


def test_an_image_has_no_vote_in_its_own_prototype() -> None:
    # Class 0 holds (1, 0), (3, 0) and (0, 2), class 1 holds (0, 1) alone, for which (5, 5) stands in.
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 1.0]]])
    labels = torch.tensor([0, 0, 0, 1])
    means = torch.tensor([[[4 / 3, 2 / 3], [0.0, 1.0]]])
    own = leave_one_out(features, means, labels, torch.full_like(features, 5.0))
    assert torch.allclose(own, torch.tensor([[[1.5, 1.0], [0.5, 1.0], [2.0, 0.0], [5.0, 5.0]]]))
    cosines = held_out_cosines(features[0], means[0], own[0], labels)
    # (0, 2) and (2, 0) are orthogonal; with its own vote the image would have .447 to its class.
    assert cosines[2].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    # (1, 0) to (1.5, 1) is 1.5 / sqrt(3.25), to the other class's whole mean 0.
    assert cosines[0].tolist() == pytest.approx([0.83205, 0.0], abs=1e-5)


def test_at_one_shot_the_shifted_image_stands_for_its_class() -> None:
    images = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    task = SupportTask([nn.Flatten()], images, torch.tensor([0, 1, 1]))
    shifted = torch.cat([images[0, :, -1:], images[0, :, :-1]], 1)
    shifted = torch.cat([shifted[:, :, -2:], shifted[:, :, :-2]], 2)
    assert torch.equal(task.own_means[0, 0], shifted.flatten())
    assert torch.allclose(task.own_means[0, 1], images[2].flatten(), atol=1e-6)


# ---- robust_loo


def cosines(margins: list[float], labels: Tensor = LABELS) -> Tensor:
    """Logits (s, 2) with these margins of the own class."""
    own = torch.tensor(margins) / 2
    return torch.where(F.one_hot(labels).bool(), own[:, None], -own[:, None])


def test_the_best_expert_by_hand() -> None:
    three = cosines([0.1, 0.1, 0.1, -0.9])  # right on 3 of 4 images, by a mean margin of -.15
    two = cosines([0.9, 0.9, -0.1, -0.1])  # on 2 of 4, by +.4
    assert best_expert(torch.stack([two, three]), LABELS) == 1
    # Both are right on all images. Means .5 and .05, deviations .4 and .01: the second, though its margins are small.
    wide, steady = cosines([0.9, 0.1, 0.9, 0.1]), cosines([0.06, 0.04, 0.06, 0.04])
    assert best_expert(torch.stack([wide, steady]), LABELS) == 1
    # A tenth of all margins is the same expert: the first of equals.
    assert best_expert(torch.stack([wide, 0.1 * wide]), LABELS) == 0
    # Class 1 has one image and counts as much as the three of class 0: 1/2 + 1/6 against 1/2.
    labels = torch.tensor([0, 0, 0, 1])
    many, few = cosines([0.1, 0.1, 0.1, -0.1], labels), cosines([-0.1, -0.1, 0.1, 0.1], labels)
    assert best_expert(torch.stack([many, few]), labels) == 1


def test_robust_loo_is_the_expert_that_the_attack_leaves_standing() -> None:
    # Channel 0 separates the classes by .02, less than twice the radius of 4.5/255 = .0176; channel 1 by .4 but for an image.
    labels = torch.arange(2).repeat_interleave(4)
    images = painted([0.49] * 4 + [0.51] * 4, [0.3] * 4 + [0.7] * 3 + [0.3])
    task = SupportTask([Reads(0), Reads(1)], images, labels)
    clean = [held_out_cosines(*parts, labels) for parts in zip(task.clean, task.means, task.own_means)]
    assert best_expert(torch.stack(clean), labels) == 0
    assert RULES["robust_loo"](task, MergeSettings()).tolist() == [0, 1]
    weak = RULES["robust_loo"]
    assert weak(task, MergeSettings(), epsilon=1 / 255).tolist() == [1, 0]


# ---- ridge


def test_ridge_by_hand() -> None:
    # Centred and of length 1, the first expert is the one-hot labels themselves, the second is orthogonal to them.
    right, beside = cosines([1.0, 1.0, 1.0, 1.0]), cosines([1.0, -1.0, 1.0, -1.0])
    both = (right + beside) / 2  # (1, 0, 1, 0): a cosine of 1 / sqrt(2) with each
    assert ridge_weights(torch.stack([right, beside]), LABELS).tolist() == pytest.approx([1, 0])
    # w = (R + .1)^-1 r with R = ((1, c), (c, 1)), r = (1, c), c = .70711: w = (.6, .0707) / .71.
    zeta = ridge_weights(torch.stack([right, both]), LABELS, 0.1)
    assert zeta.tolist() == pytest.approx([0.6 / 0.670711, 0.070711 / 0.670711], abs=1e-5)
    # The size of an expert's cosines and what they have in common over classes change nothing.
    moved = torch.stack([0.01 * right + 0.9, 5 * both - 3])
    assert torch.allclose(ridge_weights(moved, LABELS, 0.1), zeta, atol=1e-5)
    # Experts that are wrong get nothing; where all are, all weigh the same.
    assert ridge_weights(torch.stack([-right, both]), LABELS)[0] == 0
    assert ridge_weights(torch.stack([-right, -both]), LABELS).tolist() == [0.5, 0.5]


def test_ridge_does_not_trust_an_experts_own_images() -> None:
    """An expert that tells every image from every other is perfect with its own vote, and no better than chance without."""
    memorising = torch.eye(8)[None]
    fair = torch.eye(2).repeat_interleave(4, 0) + 0.3 * torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2).repeat_interleave(4)
    task = given(torch.cat([memorising, F.pad(fair, (0, 6))[None]]), labels)
    assert task.cosines()[0].argmax(1).equal(labels)
    assert RULES["ridge"](task, MergeSettings())[1] > 0.9


# ---- all rules on a pool


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Expert]:
    return saved(tmp_path_factory.mktemp("experts"), (3, 4, 5))


def mixture(experts: list[Expert], rule: str, shots: int = 3) -> Tensor:
    batch = episode(1, 5, shots=shots)
    net = PoolNet(ExpertPool(backbone(), experts), MergeSettings(strategy=rule, beta=5.0))
    return net.classifier(batch["support"], batch["support_labels"]).mixture


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("rule", [*RULES, "average"])
def test_a_rule_weights_experts_and_not_places(
    experts: list[Expert], rule: str, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeta = mixture(experts, rule, shots)
    assert float(zeta.sum()) == pytest.approx(1, abs=1e-6) and bool((zeta >= 0).all()) and not zeta.requires_grad
    order = [2, 0, 1]
    assert torch.allclose(mixture([experts[index] for index in order], rule, shots), zeta[order], atol=1e-4)
    assert torch.equal(mixture(experts, rule, shots), zeta)
    for module in (features, selection_rules):  # in pieces of two images
        monkeypatch.setattr(module, "IMAGES", 2)
    assert torch.allclose(mixture(experts, rule, shots), zeta, atol=1e-4)


def test_rules_differ(experts: list[Expert]) -> None:
    assert mixture(experts, "average").tolist() == pytest.approx([1 / 3] * 3)
    assert len({tuple(mixture(experts, rule).tolist()) for rule in ("paper", "ridge", "robust_loo")}) >= 2
    with pytest.raises(UserError, match=r"merging\.strategy: 'centred'"):
        MergeSettings("centred")
