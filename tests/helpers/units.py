"""Units for tests of workers, in a module that a spawned process can import."""

from __future__ import annotations

import os
import time
from pathlib import Path


def die(flag: Path, times: int) -> None:
    """End this process as the kernel does when memory is short, the first `times` times; count the calls in `flag`."""
    count = int(flag.read_text()) if flag.exists() else 0
    flag.write_text(str(count + 1))
    if count < times:
        os._exit(9)


def mark(path: Path) -> None:
    """Leave a file."""
    path.touch()


def sleep(path: Path, seconds: float) -> None:
    """Write the number of this process into a file, and sleep."""
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(seconds)
