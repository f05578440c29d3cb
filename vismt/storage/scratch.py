"""A scratch folder beside the folder that it fills, for one process at a time; leftovers of killed processes are removed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from vismt.base import console


@contextmanager
def scratch_beside(folder: Path, stage: str) -> Iterator[Path]:
    """Hold the lock of `folder` and yield an empty scratch folder on its disk, so that moves into `folder` are atomic.

    stage: of the line that is printed where another process holds the lock. Raises OSError where nothing can be written.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.stage(stage, f"{folder.name}   another process is fetching it, waiting")
        lock.acquire()
    try:
        # Of processes that were killed: no other process holds the lock.
        for leftover in root.glob(f".{escape(folder.name)}.part-*"):
            rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder.name}.part-") as scratch:
            yield Path(scratch)
    finally:
        lock.release()
