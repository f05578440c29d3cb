"""The processes of a launch share an evaluation: each runs some of the blocks, and every one gets the rows of all.

Sharing is on inside `shared()` only, which all processes have to enter together: work that one process does alone (choosing a
rate, a report) may call the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
_sharing = False


@contextmanager
def shared() -> Iterator[None]:
    """Share evaluations among the processes inside the block; with one process nothing changes."""
    global _sharing
    before = _sharing
    _sharing = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    try:
        yield
    finally:
        _sharing = before


def rank() -> int:
    """Return the number of this process among those that share, 0 where it works alone."""
    return dist.get_rank() if _sharing else 0


def count() -> int:
    """Return the number of processes that share, 1 where this one works alone."""
    return dist.get_world_size() if _sharing else 1


def gather(item: T) -> list[T]:
    """Return the items of all processes by rank."""
    if not _sharing:
        return [item]
    items: list = [None] * count()
    dist.all_gather_object(items, item)
    return items
