"""Share an evaluation among the processes of a launch: each runs some blocks or batches, and every process gets all results.

Sharing is on only inside `shared()`, which all processes have to enter together, so that work of a single process (a report)
may call the same functions. The first process reads and writes files, and all processes get what it read. A UserError of one
process is raised in all of them, so that none waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, cast

import torch.distributed as dist

from vismt.base.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_sharing = False


@contextmanager
def shared() -> Iterator[None]:
    """Share evaluations among the processes inside the block. With one process nothing changes."""
    with _set_sharing(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield


@contextmanager
def _set_sharing(sharing: bool) -> Iterator[None]:
    global _sharing
    before = _sharing
    _sharing = sharing
    try:
        yield
    finally:
        _sharing = before


def rank() -> int:
    """Return the number of this process among the processes that share. A process that works alone has 0."""
    return dist.get_rank() if _sharing else 0


def count() -> int:
    """Return the number of processes that share. For a process that works alone it is 1."""
    return dist.get_world_size() if _sharing else 1


def gather(item: T) -> list[T]:
    """Return the items of all processes by rank."""
    if not _sharing:
        return [item]
    items: list = [None] * count()
    dist.all_gather_object(items, item)
    return items


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Return every n-th item, which are the items that this process runs."""
    return items[rank() :: count()]


def share(items: Iterable[T], run: Callable[[T], R]) -> Iterator[R]:
    """Yield `run` of every item in order, in all processes. Each process runs every n-th item.

    Results have to be on the CPU. All processes need equal items.
    """
    outcome: _Outcome[R] = None, None
    place = 0
    for item in items:
        if place == rank():
            outcome = _outcome(partial(run, item))
        place += 1
        if place == count():
            yield from _results(outcome)
            outcome, place = (None, None), 0
    if place:
        yield from _results(outcome)[:place]


def on_first(function: Callable[[], T]) -> T:
    """Return what a function returns in the first process. Only this process calls it, and nothing inside it is shared."""
    outcome: _Outcome[T] = None, None
    if rank() == 0:
        with _set_sharing(False):
            outcome = _outcome(function)
    return _results(outcome)[0]


_Outcome = tuple[T | None, UserError | None]


def _outcome(function: Callable[[], T]) -> _Outcome[T]:
    """Return what a function returns, or its UserError."""
    try:
        return function(), None
    except UserError as error:
        return None, error


def _results(outcome: _Outcome[T]) -> list[T]:
    """Return the results of all processes by rank. Raise the first UserError of any process in all of them."""
    outcomes = gather(outcome)
    for number, (_, error) in enumerate(outcomes):
        if error is not None:
            error.elsewhere = number != rank()
            raise error
    return [cast("T", result) for result, _ in outcomes]
