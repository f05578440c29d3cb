"""What tests of damaged input share: settings of Hypothesis, and a guard against input that hangs."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from vismt.base.errors import UserError


def cases(quick: int, campaign: int) -> pytest.MarkDecorator:
    """Parametrise a test by its number of cases: few in every run, many in a campaign."""
    return pytest.mark.parametrize("cases", [quick, pytest.param(campaign, marks=pytest.mark.campaign)])


def many(count: int) -> settings:
    """Return settings for `count` cases that are the same in every run."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


class Hang(AssertionError):
    """A body that does not end."""


@contextmanager
def no_hang(what: Any, seconds: int = 20) -> Iterator[None]:
    """Fail for a body that runs longer than `seconds`, as one that waits for the writer of a named pipe."""

    def give_up(*_: Any) -> None:
        raise Hang(f"still running after {seconds} s: {what!r}")

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


# Outcomes of a trial that are right. The others: "traceback", "hang", "silent" (other numbers, and no word about it) and
# "changed" (refused, and the model is another one).
SOUND = ("refused", "harmless")


def tried(body: Callable[[], bool]) -> str:
    """Return the outcome of a trial whose body returns whether the numbers are the right ones; "hang" above 10 s of CPU."""
    start = time.process_time()
    try:
        with no_hang(body, seconds=120):
            result = "harmless" if body() else "silent"
    except UserError as error:
        result = "refused" if str(error) and "\n" not in str(error)[:50] else "traceback"
    except Hang:
        return "hang"
    except Exception:
        traceback.print_exc()
        result = "traceback"
    return "hang" if time.process_time() - start > 10 else result
