"""Contexts for one thread or eval mode inside a block, and parallel work with one thread for each item."""

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
    """Use one intra-op thread inside the block.

    Timings are then comparable, and sums have one order (BLAS adds in an order that depends on the number of threads).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode inside the block. Afterwards every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Repeatable:
    """A context that enters the contexts that `make` returns. Unlike most contexts it may be entered more than once."""

    def __init__(self, make: Callable[[], Iterable[AbstractContextManager]]) -> None:
        self.make = make
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as entered:  # if a context fails, the earlier ones are left again
            for context in self.make():
                entered.enter_context(context)
            self._entered.append(entered.pop_all())

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work` of every item, in order.

    As many items run at a time as torch has threads, and each item uses one thread. Decompositions of small matrices gain
    nothing from several threads, and lose much on a busy machine. The grad mode does not reach the workers, so `work` has to
    set it. The first error is raised when all started items are done.
    """
    workers = min(torch.get_num_threads(), len(items))
    with one_thread():
        if workers < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
