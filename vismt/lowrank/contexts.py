"""What holds while a block runs, one thread or eval mode; and work on many items with one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one intra-op thread inside the block: comparable timings, and sums in one order (BLAS adds by thread)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode inside the block, and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Repeatable:
    """Enters the contexts that `make` returns; unlike most contexts it may be entered more than once."""

    def __init__(self, make: Callable[[], Iterable[AbstractContextManager]]) -> None:
        self.make = make
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as entered:  # left again where one of them fails
            for context in self.make():
                entered.enter_context(context)
            self._entered.append(entered.pop_all())

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work` of every item, in order; as many run at a time as torch has threads, each on one thread.

    Decompositions of small matrices gain nothing from threads inside, and lose much where the machine is busy. The
    grad mode does not reach the workers: `work` sets it. The first error is raised when all that has begun is done.
    """
    workers = min(torch.get_num_threads(), len(items))
    with one_thread():
        if workers < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
