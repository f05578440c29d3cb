"""Torch on one thread for a while, and the same work on many things with one thread for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread inside the block: timings that compare, and sums in one order (BLAS adds by thread)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` on every item, as many at a time as torch has threads, each on one thread; answers in the items' order.

    Decompositions of small matrices gain nothing from threads inside, and lose much where the machine is busy. A grad
    mode does not reach the workers: `work` sets its own. The first error is raised when all that has begun is done.
    """
    workers = min(torch.get_num_threads(), len(items))
    with one_thread():
        if workers < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
