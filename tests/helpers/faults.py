"""What tests of damaged input share: settings of Hypothesis, and a guard against input that hangs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from vismt.errors import UserError


def cases(quick: int, slow: int) -> pytest.MarkDecorator:
    """Parametrise a test by its number of cases: few in every run, many in slow ones."""
    return pytest.mark.parametrize("cases", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def many(count: int) -> settings:
    """Return settings for `count` cases that are the same in every run."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@contextmanager
def no_hang(what: Any, seconds: int = 20) -> Iterator[None]:
    """Fail for a body that runs longer than `seconds`, as one that waits for the writer of a named pipe."""

    def give_up(*_: Any) -> None:
        raise AssertionError(f"still running after {seconds} s: {what!r}")

    earlier = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@contextmanager
def refused_or_harmless(what: Any) -> Iterator[None]:
    """Let a UserError pass; fail for every other exception, and for a body that hangs."""
    try:
        with no_hang(what):
            yield
    except UserError:
        return
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} ({error}) instead of a UserError for {what!r}") from error
