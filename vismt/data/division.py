"""Division of a set into training, validation and test examples, and choice of a smaller training set.

A part consists of neighbours in the order of the set, within each class: neighbours are often frames of one object, which
should not be in two parts. Where the caller knows groups of examples, each group is in one part. Nothing is random, so that
every run and seed has the same parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vismt.base.errors import UserError


def divide(
    labels: Tensor, shares: Mapping[str, float], name: str, groups: Tensor | None = None, classes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Divide a set into parts; every part has at least one example of each class.

    Args:
        labels: int64 (n,).
        shares: {part: share of every class}; groups of several examples make it an approximate one.
        name: of the set, for messages.
        groups: int64 (n,), equal for examples of a class that belong in one part, ascending with the first example of each;
            None for no such examples.
        classes: their names, for messages.

    Returns:
        Indices (int64, ascending) of each part of `shares`, and of "train", the rest.

    Raises:
        UserError: shares that leave nothing to train on, and a class with too few examples or groups.
    """
    total = sum(shares.values())
    if any(not 0 < share < 1 for share in shares.values()) or not total < 1:
        listed = ", ".join(f"{part} {share:g}" for part, share in shares.items())
        raise UserError(f"'{name}': shares {listed}; each must be between 0 and 1, and their sum below 1.")
    groups = torch.arange(len(labels)) if groups is None else groups
    parts = ("train", *shares)
    chosen = torch.zeros_like(labels)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        ids, place, sizes = groups[members].unique(return_inverse=True, return_counts=True)
        counts = [max(1, round(share * len(members))) for share in shares.values()]
        if len(members) - sum(counts) < 1 or len(ids) < len(parts):
            shown = f"'{classes[label]}'" if classes else label
            grouped = len(ids) < len(members)
            apart = f" in {len(ids)} groups of near-duplicates" if grouped else ""
            fix = "take fewer parts, or a card with `groups: none`" if grouped else "lower the shares"
            raise UserError(
                f"'{name}': class {shown} has {len(members)} examples{apart}, too few for {len(parts)} parts; {fix}."
            )
        ends = torch.tensor([len(members) - sum(counts), *counts]).cumsum(0)
        # A group is in the part that its middle falls into, unless that left a part empty.
        wanted = torch.bucketize(sizes.cumsum(0) - sizes / 2, ends, right=True).tolist()
        numbers = [-1]
        for left, part in zip(range(len(ids), 0, -1), wanted):
            numbers.append(min(max(part, len(parts) - left), numbers[-1] + 1))
        chosen[members] = torch.tensor(numbers[1:])[place]
    return {part: (chosen == number).nonzero().flatten() for number, part in enumerate(parts)}


def limited(labels: Tensor, ids: Sequence[str], limit: int) -> Tensor:
    """Return the indices (int64, ascending) of `limit` images, spread over the classes as evenly as possible.

    The choice is by a hash of the ids: the first image of every class, then the second, and so on; the images of a smaller
    limit are among those of a larger one. labels: int64 (n,).
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
