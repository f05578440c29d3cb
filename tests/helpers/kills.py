"""Runs in forked processes that are stopped by a signal, at a moment or before one of their file operations."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from vismt.cli import main

SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
OPERATIONS = ["replace", "fsync", "unlink"]


def run(config: Path, out: Path) -> int:
    """Run a configuration in this process and return the exit code."""
    return main(["run", str(config), "--out", str(out), "--quiet"])


def killed(config: Path, out: Path, random: Random, seconds: float) -> bool:
    """Run in another process and stop it: within `seconds`, or before a file operation. Return whether it was stopped."""
    stop = random.choice(SIGNALS)
    operation, number = random.choice([None, *OPERATIONS]), random.randrange(1, 30)
    process = get_context("fork").Process(target=_child, args=(config, out, operation, number, stop))
    process.start()
    if operation is None:
        process.join(random.uniform(0, seconds))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, stop)
    process.join()
    return process.exitcode != 0


def _child(config: Path, out: Path, operation: str | None, number: int, stop: int) -> None:
    if operation is not None:
        stop_before(operation, number, stop)
    raise SystemExit(run(config, out))


def stop_before(operation: str, number: int, stop: int) -> None:
    """Replace an operation of `os`, which sends the signal to this process before call `number`."""
    real: Callable[..., Any] = getattr(os, operation)
    calls = 0

    def hooked(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), stop)
        return real(*arguments, **options)

    setattr(os, operation, hooked)


def timed(config: Path, out: Path) -> float:
    """Run undisturbed and return the seconds that it took."""
    start = time.monotonic()
    assert run(config, out) == 0
    return time.monotonic() - start
