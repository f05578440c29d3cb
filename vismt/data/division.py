"""Divide a set into training, validation and test examples, and choose a smaller training set.

A part consists of neighbours in the order of the set, within each class. Neighbours are often frames of one object, which
should not be in two parts. If the caller knows groups of examples, each group is in one part, also a group with examples of
several classes. Nothing is random, so that every run and seed has the same parts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vismt.base.errors import UserError


def divide(
    labels: Tensor, shares: Mapping[str, float], name: str, groups: Tensor | None = None, classes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Divide a set into parts. Every part has at least one example of each class.

    Args:
        labels: Labels int64 (n,).
        shares: Share of every class by part. Groups of several examples make it approximate.
        name: Name of the set, for messages.
        groups: Numbers int64 (n,), equal for examples that belong in one part, ascending with the first example of each group.
            None for no groups.
        classes: Names of the classes, for messages.

    Returns:
        Indices (int64, ascending) of each part of `shares`, and of "train", the rest.

    Raises:
        UserError: If the shares leave nothing to train on, or a class has too few examples or groups.
    """
    total = sum(shares.values())
    if any(not 0 < share < 1 for share in shares.values()) or not total < 1:
        listed = ", ".join(f"{part} {share:g}" for part, share in shares.items())
        raise UserError(f"'{name}': shares {listed}; each must be between 0 and 1, and their sum below 1.")
    groups = torch.arange(len(labels)) if groups is None else groups
    part_of: dict[int, int] = {}
    by_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    # A class with few groups has the least choice, if other classes share them.
    for members in sorted(by_class, key=lambda members: len(groups[members].unique())):
        wanted = [max(1, round(share * len(members))) for share in shares.values()]
        wanted.insert(0, len(members) - sum(wanted))
        if wanted[0] < 1 or not _place(groups[members], wanted, part_of):
            label = int(labels[members[0]])
            shown = f"'{classes[label]}'" if classes else label
            count = len(groups[members].unique())
            grouped = count < len(members)
            apart = f" in {count} groups of near-duplicates" if grouped else ""
            apart += " that other classes share" if grouped and count >= len(wanted) <= len(members) else ""
            fix = "add examples, or remove the class" if len(members) < len(wanted) else "lower the shares"
            fix = "take fewer parts, or a card with `groups: none`" if grouped else fix
            raise UserError(
                f"'{name}': class {shown} has {len(members)} examples{apart}, too few for {len(wanted)} parts; {fix}."
            )
    chosen = torch.tensor([part_of[group] for group in groups.tolist()])
    return {part: (chosen == number).nonzero().flatten() for number, part in enumerate(("train", *shares))}


def _place(groups: Tensor, wanted: Sequence[int], part_of: dict[int, int]) -> bool:
    """Add the groups of the examples of a class to `part_of`, the part by group. Return whether every part has an example.

    groups: Groups int64 (n,). wanted: Number of examples of each part.
    """
    ids, sizes = (values.tolist() for values in groups.unique(return_counts=True))
    left = list(wanted)
    for group, size in zip(ids, sizes):
        if group in part_of:
            left[part_of[group]] -= size
    empty = {part for part, count in enumerate(wanted) if left[part] == count}
    free = [(group, size) for group, size in zip(ids, sizes) if group not in part_of]
    if len(free) < len(empty):
        return False
    open_parts = [part for part in range(len(left)) if part in empty or left[part] > 0]
    if len(free) < len(open_parts):
        open_parts = sorted(empty) or [max(open_parts, key=left.__getitem__)]
    ends = list(accumulate(max(1, left[part]) for part in open_parts))
    number, before = -1, 0
    for place, (group, size) in enumerate(free):
        # A group goes to the part that its middle falls into, unless that left a part empty.
        middle = max(bisect_right(ends, before + size / 2), len(open_parts) - len(free) + place)
        number = min(middle, number + 1, len(open_parts) - 1)
        part_of[group] = open_parts[number]
        before += size
    return True


def unseen(
    training: Sequence[Hashable],
    others: Sequence[Hashable],
    name: str,
    groups: Sequence[Hashable] = (),
    *,
    divided: bool,
) -> list[bool]:
    """Return which training examples have a content that no validation or test example has.

    Args:
        training, others: Content of each example.
        name: Name of the task or set, for messages.
        groups: Group of each training example, None for no group. A group with such an example is left out.
        divided: Whether the parts are shares of one set. All are kept then if none would be left.

    Raises:
        UserError: If no training example is left.
    """
    seen, of = {*others}, groups or [None] * len(training)
    out = {group for group, content in zip(of, training) if content in seen} - {None}
    kept = [content not in seen and group not in out for group, content in zip(of, training)]
    if divided and not any(kept):  # a set of nothing but repeats
        return [True] * len(kept)
    if kept and not any(kept):
        raise UserError(
            f"{name}: all {len(kept):,} training examples are also in validation or test, by their content; name another set to "
            "test on."
        )
    return kept


def limited(labels: Tensor, ids: Sequence[str], limit: int) -> Tensor:
    """Return the indices (int64, ascending) of `limit` images, spread over the classes as evenly as possible.

    The choice is by a hash of the ids: the first image of every class, then the second, and so on. The images of a smaller
    limit are among the images of a larger limit.

    labels: Labels int64 (n,).
    """
    if limit < 1:
        raise UserError(f"limit: {limit}; it must be at least 1.")
    keys = [hashlib.blake2b(name.encode(), digest_size=8).hexdigest() for name in ids]
    order = sorted(range(len(ids)), key=keys.__getitem__)
    counts: dict[int, int] = {}
    ranked = []
    for i in order:
        label = int(labels[i])
        ranked.append((counts.get(label, 0), i))
        counts[label] = counts.get(label, 0) + 1
    chosen = [i for _, i in sorted(ranked, key=lambda pair: (pair[0], keys[pair[1]]))[:limit]]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def validation_parts(labels: Tensor, apart: bool, groups: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """Return masks (n,) of the validation examples that choose learning rates, and of the examples on which features are fitted.

    They are the halves of every class, each of neighbours as in `divide`, if the two are apart, else all examples. No group is in
    both halves.

    Args:
        labels: int64 (n,).
        apart: Whether the two masks are disjoint.
        groups: Group of each example; () for independent examples.
    """
    if not apart:
        return torch.ones_like(labels, dtype=torch.bool), torch.ones_like(labels, dtype=torch.bool)
    named: Sequence[Hashable] = groups or range(len(labels))
    chooses: dict[Hashable, bool] = {}
    before = 0
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().tolist()
        count = (before + len(members)) // 2 - before // 2  # so that half of all choose where classes are odd
        before += len(members)
        sizes = Counter(named[i] for i in members)
        count -= sum(size for group, size in sizes.items() if chooses.get(group))  # with an earlier class
        done = 0
        for group in [group for group in sizes if group not in chooses]:
            chooses[group] = done + sizes[group] / 2 < count
            done += sizes[group]
    mask = torch.tensor([chooses[group] for group in named], dtype=torch.bool)
    return mask, ~mask
