"""Division of a labelled set into training, validation and test images, and choice of a smaller training set.

A part consists of neighbours in the order of the set, within each class: neighbours are often frames of one object, which
should not be in two parts. Nothing is random, so that every run and seed has the same parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vismt.errors import UserError


def divide(labels: Tensor, shares: Mapping[str, float], name: str) -> dict[str, Tensor]:
    """Divide a set into parts; every part has at least one image of each class.

    Args:
        labels: int64 (n,).
        shares: {part: share of every class}.
        name: of the set, for messages.

    Returns:
        Indices (int64, ascending) of each part of `shares`, and of "train", the rest.

    Raises:
        UserError: shares that leave nothing to train on, and a class with too few images.
    """
    total = sum(shares.values())
    if any(not 0 < share < 1 for share in shares.values()) or not total < 1:
        listed = ", ".join(f"{part} {share:g}" for part, share in shares.items())
        raise UserError(f"'{name}': shares {listed}; each must be between 0 and 1, and their sum below 1.")
    parts: dict[str, list[Tensor]] = {part: [] for part in ("train", *shares)}
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        counts = {part: max(1, round(share * len(members))) for part, share in shares.items()}
        rest = len(members) - sum(counts.values())
        if rest < 1:
            raise UserError(
                f"'{name}': class {label} has {len(members)} images, too few for {len(counts) + 1} parts; lower the shares."
            )
        chunks = members.split([rest, *counts.values()])
        for part, chunk in zip(parts, chunks, strict=True):
            parts[part].append(chunk)
    return {part: torch.cat(chunks).sort().values for part, chunks in parts.items()}


def limited(labels: Tensor, ids: Sequence[str], limit: int) -> Tensor:
    """Return the indices (int64, ascending) of `limit` images, spread over the classes as evenly as possible.

    The choice is by a hash of the ids: the first image of every class, then the second, and so on; the images of a smaller
    limit are among those of a larger one.

    Args:
        labels: int64 (n,).
        ids: n names.
        limit: number of images, at least 1.
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
