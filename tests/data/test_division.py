"""Dividing a labelled set and drawing a smaller one from it."""

from __future__ import annotations

import pytest
import torch

from vismt.base.errors import UserError
from vismt.data.division import divide, limited

LABELS = torch.tensor([0] * 10 + [1] * 4 + [0] * 2)


def test_parts_are_runs_of_neighbours_within_each_class() -> None:
    parts = divide(LABELS, {"test": 0.25, "validation": 0.25}, "birds")
    assert {part: index.tolist() for part, index in parts.items()} == {
        # class 0 is 0..9, 14, 15 in the set's order: 6 to train, then 3, then 3; class 1 is 10..13: 2, 1, 1.
        "train": [0, 1, 2, 3, 4, 5, 10, 11],
        "test": [6, 7, 8, 12],
        "validation": [9, 13, 14, 15],
    }
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(16))


def test_every_part_has_every_class_whatever_the_share() -> None:
    parts = divide(LABELS, {"test": 0.01}, "birds")
    assert LABELS[parts["test"]].unique().tolist() == [0, 1]
    assert len(parts["test"]) == 2


def test_a_group_is_in_one_part_and_the_parts_keep_their_sizes() -> None:
    # Pairs (0, 5), (1, 6), ... of one class: 10 images in 5 groups, 6 to train and 2 to each of the others.
    parts = divide(torch.zeros(10, dtype=torch.int64), {"test": 0.2, "validation": 0.2}, "birds", torch.arange(10) % 5)
    assert {part: index.tolist() for part, index in parts.items()} == {
        "train": [0, 1, 2, 5, 6, 7],
        "test": [3, 8],
        "validation": [4, 9],
    }


@pytest.mark.parametrize("place", range(4))
def test_a_group_of_most_of_a_class_leaves_no_part_empty(place: int) -> None:
    groups = torch.arange(12)
    groups[place : place + 9] = place
    parts = divide(torch.zeros(12, dtype=torch.int64), {"test": 0.25, "validation": 0.25}, "birds", groups)
    assert all(len(index) for index in parts.values()) and sum(map(len, parts.values())) == 12
    assert sum(bool((groups[index] == place).any()) for index in parts.values()) == 1


def test_a_group_of_several_classes_is_in_one_part_and_every_part_has_every_class() -> None:
    # Ten patients have images of three classes each, as neighbours in the order of the set.
    patients, labels = torch.arange(10).repeat_interleave(6), torch.arange(3).repeat(20)
    parts = divide(labels, {"test": 0.2, "validation": 0.2}, "patients", patients)
    seen = {part: set(patients[index].tolist()) for part, index in parts.items()}
    assert {part: len(found) for part, found in seen.items()} == {"train": 6, "test": 2, "validation": 2}
    assert len(set().union(*seen.values())) == 10
    assert all(labels[index].unique().tolist() == [0, 1, 2] for index in parts.values())
    # One picture under two names moves no other example.
    groups = torch.arange(20)
    groups[13] = 0
    parts = divide(torch.arange(20) // 10, {"test": 0.4}, "twice", groups)
    assert parts["test"].tolist() == [6, 7, 8, 9, 16, 17, 18, 19] and {0, 13} <= set(parts["train"].tolist())


def test_a_class_whose_groups_lie_in_too_few_parts() -> None:
    # Every group of class 1 has an example of class 0, which has put most of them into training.
    labels = torch.tensor([0] * 3 + [1] * 3 + [2] * 9)
    groups = torch.tensor([0, 1, 2, 0, 0, 1, *range(6, 15)])
    with pytest.raises(UserError, match="'made': class 1 has 3 examples in 2 groups of near-duplicates"):
        divide(labels, {"test": 0.3, "validation": 0.3}, "made", groups)


def test_a_class_with_fewer_groups_than_parts() -> None:
    with pytest.raises(
        UserError,
        match="'birds': class 0 has 9 examples in 2 groups of near-duplicates, too few for 3 parts; take fewer",
    ):
        divide(torch.zeros(9, dtype=torch.int64), {"test": 0.2, "validation": 0.2}, "birds", torch.arange(9) // 5 * 5)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"test": 1.0}, "between 0 and 1"),
        ({"test": 0.6, "validation": 0.5}, "and their sum below 1"),
        ({"test": -0.1}, "between 0 and 1"),
        ({"test": 0.1, "validation": 0.1, "more": 0.1, "most": 0.1}, "class 1 has 4 examples, too few for 5 parts"),
    ],
)
def test_shares_that_do_not_work(shares: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divide(LABELS, shares, "birds")


def test_a_limit_is_spread_over_the_classes_and_grows() -> None:
    ids = [f"image {i}" for i in range(16)]
    chosen = limited(LABELS, ids, 6)
    assert torch.bincount(LABELS[chosen]).tolist() == [3, 3]
    assert chosen.tolist() == sorted(chosen.tolist())
    assert set(chosen.tolist()) < set(limited(LABELS, ids, 9).tolist())
    assert torch.bincount(LABELS[limited(LABELS, ids, 10)]).tolist() == [6, 4]  # class 1 has no more
    assert len(limited(LABELS, ids, 99)) == 16
    # The order in which the set lists its images does not matter, and it is not simply the first ones.
    turned = torch.arange(15, -1, -1)
    again = limited(LABELS[turned], [ids[i] for i in turned.tolist()], 6)
    assert sorted(turned[again].tolist()) == chosen.tolist() != [0, 1, 2, 10, 11, 12]


def test_no_images_at_all() -> None:
    with pytest.raises(UserError, match="limit: 0; it must be at least 1"):
        limited(LABELS, [str(i) for i in range(16)], 0)
