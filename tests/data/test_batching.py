"""Several stores behind one index, and the batches drawn from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.batching import Gathered, InOrder, ShuffledBatches
from vismt.data.images import ImageSet
from vismt.data.pixels import Pixels


def store(name: str, first: int, count: int, size: int = 2) -> Pixels:
    """Images with all pixels equal to their number."""
    images = ImageSet(
        name,
        "train",
        ["a"],
        torch.zeros(count, dtype=torch.int64),
        [f"{i}" for i in range(count)],
        lambda i: torch.full((3, size, size), first + i, dtype=torch.uint8),
        lambda: name,
    )
    return Pixels(images, size)


@pytest.fixture
def gathered() -> Gathered:
    return Gathered([(store("x", 0, 5), torch.arange(5)), (store("y", 100, 3), torch.arange(10, 13))])


def test_images_labels_and_ids_go_together(gathered: Gathered) -> None:
    index = torch.tensor([6, 0, 4, 7, 0])
    assert (gathered[index][:, 0, 0, 0] * 255).round().tolist() == [101, 0, 4, 102, 0]
    assert gathered.labels[index].tolist() == [11, 0, 4, 12, 0]
    assert [gathered.ids[i] for i in index.tolist()] == ["y:1", "x:0", "x:4", "y:2", "x:0"]
    assert gathered[index].dtype == torch.float32
    assert len(gathered) == 8


def test_a_pass_has_every_image_once_and_its_own_order(gathered: Gathered) -> None:
    batches = ShuffledBatches(gathered, 4, seed=3)
    passes = [torch.cat([batches(turn * 2 + k)["labels"] for k in range(2)]) for turn in range(3)]
    assert all(sorted(labels.tolist()) == sorted(gathered.labels.tolist()) for labels in passes)
    assert not torch.equal(passes[0], passes[1])
    # A batch is a function of its number, whatever was read before; another seed has another order.
    assert torch.equal(ShuffledBatches(gathered, 4, seed=3)(4)["images"], batches(4)["images"])
    assert not torch.equal(
        ShuffledBatches(gathered, 8, seed=4)(0)["labels"], ShuffledBatches(gathered, 8, seed=3)(0)["labels"]
    )


def test_what_is_left_of_a_pass_is_dropped(gathered: Gathered) -> None:
    batches = ShuffledBatches(gathered, 3, seed=0)  # 2 batches of 3, 2 images left
    labels = torch.cat([batches(0)["labels"], batches(1)["labels"]])
    assert len(labels.unique()) == 6
    assert not torch.equal(batches(2)["labels"], batches(0)["labels"])


def test_augmentation_has_a_seed_for_each_batch(gathered: Gathered) -> None:
    seeds: list[int] = []

    def change(images: Tensor, seed: int) -> Tensor:
        seeds.append(seed)
        return images + 1

    batches = ShuffledBatches(gathered, 4, seed=0, augment=change)
    assert float(batches(0)["images"].min()) >= 1
    batches(1), batches(0)
    assert seeds[0] == seeds[2] != seeds[1]


def test_in_order_can_be_gone_through_again(gathered: Gathered) -> None:
    batches = InOrder(gathered, 3)
    assert len(batches) == 3
    for _ in range(2):
        passed = list(batches)
        assert [name for _, _, ids in passed for name in ids] == gathered.ids
        assert torch.equal(torch.cat([labels for _, labels, _ in passed]), gathered.labels)
        assert [len(images) for images, _, _ in passed] == [3, 3, 2]


def test_errors(gathered: Gathered) -> None:
    with pytest.raises(UserError, match="batch: 9, with 8 training images"):
        ShuffledBatches(gathered, 9, seed=0)
    with pytest.raises(UserError, match=r"images of \[2, 4\] px"):
        Gathered([(store("x", 0, 2), torch.arange(2)), (store("y", 0, 2, size=4), torch.arange(2))])
