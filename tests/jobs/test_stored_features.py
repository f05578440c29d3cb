"""Features of a frozen backbone in the classification job: once for all heads, and the logits of the whole net."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.amt_parts import drawn
from helpers.tiny import tiny_vit
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.data.batching import Gathered, InOrder, ShuffledBatches
from vismt.jobs.multitask.models import PixelNet, stored
from vismt.metatune import features
from vismt.uncertainty.last_layers import make_head

LABELS = torch.arange(10) % 6


class Drawn:
    """Images with what Gathered reads of a set."""

    size, name, key = 16, "gratings", "gratings of 16 px"
    ids = tuple(str(number) for number in range(len(LABELS)))

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: Tensor) -> Tensor:
        return drawn(LABELS, 3)[index]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Number of images in every pass of a backbone."""
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    counts: list[int] = []
    compute = features._computed

    def counting(backbone: nn.Module, images: Tensor, batch: int | None) -> Tensor:
        counts.append(len(images))
        return compute(backbone, images, batch)

    monkeypatch.setattr(features, "_computed", counting)  # a counter inside the backbone would change it
    return counts


def net(head: nn.Module | None = None, *, frozen: bool = True, seed: int = 0) -> PixelNet:
    """Return a net with the same backbone each time, and a head drawn from `seed` unless one is given."""
    made = PixelNet(Backbone(tiny_vit(0, num_classes=6), mean=(0.5,) * 3, std=(0.2,) * 3))
    nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(seed))
    if head is not None:
        made.stock.add_module("head", head)
    made.frozen = frozen
    return made.requires_grad_(False).eval()


@torch.no_grad()
def logits(model: PixelNet, keyed: bool = True) -> Tensor:
    images = Gathered([(Drawn(), LABELS)])
    if not keyed:
        images.key = None
    with stored(images) as marked:
        return torch.cat([model(part) for part, _, _ in InOrder(marked, 4)])


def test_heads_share_the_features_and_have_the_logits_of_the_whole_net(computed: list[int]) -> None:
    first = logits(net(seed=0))
    assert sum(computed) >= len(LABELS)
    computed.clear()
    second = logits(net(seed=1))  # another net object, as every training loads its own
    assert computed == []
    for model, found in ((net(seed=0, frozen=False), first), (net(seed=1, frozen=False), second)):
        assert torch.equal(logits(model), found)
    assert not torch.allclose(first, second)


def test_a_bayesian_head_reads_the_same_features(computed: list[int]) -> None:
    logits(net())
    computed.clear()
    head = make_head("vbll", torch.zeros(6, 32), None, 10, 0, {})
    found = logits(net(head))
    assert computed == []
    assert torch.equal(found, logits(net(head, frozen=False)))


def test_changed_weights_and_trained_backbones_are_computed(computed: list[int]) -> None:
    logits(net())
    computed.clear()
    changed = net()
    changed.stock.get_parameter("blocks.0.mlp.fc1.weight").mul_(1.5)
    assert not torch.allclose(logits(changed), logits(net()))
    assert sum(computed) >= len(LABELS)
    computed.clear()
    trained = net(frozen=False)
    assert torch.equal(logits(trained), logits(net()))
    assert computed == []  # `logits` of timm's model ran instead


def test_changed_images_are_computed(computed: list[int]) -> None:
    model = net()
    images = Gathered([(Drawn(), LABELS)])
    with stored(images) as marked, torch.no_grad():
        part = InOrder(marked, 4)[0][0]
        clean = model(part)
        computed.clear()
        assert not torch.allclose(model(part.flip(3)), clean)
    assert computed == [4]


def test_images_without_a_key_are_not_kept_for_another_run(computed: list[int]) -> None:
    logits(net(), keyed=False)
    computed.clear()
    logits(net(), keyed=False)
    assert sum(computed) >= len(LABELS)


def test_training_reads_the_features_and_has_the_gradients_of_the_whole_net(computed: list[int]) -> None:
    gradients = []
    for frozen in (True, False):
        model = net(frozen=frozen)
        model.head.requires_grad_(True)
        model.train()
        with stored(Gathered([(Drawn(), LABELS)])) as images:
            batches = ShuffledBatches(images, 5, seed=0)
            for number in range(6):  # three passes
                batch = batches(number)
                nn.functional.cross_entropy(model(batch["images"]), batch["labels"]).backward()
        gradients.append(model.head.weight.grad)
        if frozen:
            assert len(LABELS) <= sum(computed) < 2 * len(LABELS)
    assert torch.equal(*gradients)


def test_the_backbone_stays_in_evaluation_mode_and_the_head_does_not() -> None:
    model = net().train()
    assert model.head.training and not model.backbone.training and not model.stock.blocks[0].training
    assert net(frozen=False).train().stock.blocks[0].training


def test_gradients_reach_the_images(computed: list[int]) -> None:
    with stored(Gathered([(Drawn(), LABELS)])) as images:
        model, part = net(), images[torch.arange(4)]
        model(part)
        part.requires_grad_(True)
        model(part).square().sum().backward()
    assert part.grad.abs().max() > 0
