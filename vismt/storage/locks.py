"""Folders that one process at a time may fill: a run folder is locked while it is written, a download has a scratch folder.

The system frees a lock when its process ends, however it ends, so no lock outlives a killed process.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from shutil import rmtree
from typing import Any

from vismt.base.errors import UserError
from vismt.storage.files import atomic_write, cannot_write, check_name, read_json

LOCK, HOLDER = ".lock", ".lock-holder"
# Seconds in which the worker processes of a killed process end, and with them its lock.
WORKERS_END_S = 15


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():
        return False
    try:
        FileLock(folder / LOCK).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except OSError:  # a folder that this user cannot write
        return False
    return False


@contextmanager
def locked(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock of a folder, which one process at a time has; the folder is made if it does not exist.

    The holder's host and process are recorded beside it. Another process is waited for `wait_s` seconds, without a limit where
    negative; then UserError names it.
    """
    from filelock import FileLock, Timeout

    check_name(folder)
    me = {"host": platform.node(), "pid": os.getpid()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=wait_s)
        except Timeout:
            holder = _holder(folder)
            if holder.get("host") != me["host"] or _lives(holder.get("pid")):
                raise
            lock.acquire(timeout=WORKERS_END_S)
        atomic_write(folder / HOLDER, json.dumps(me))
    except Timeout as error:
        holder = _holder(folder)
        who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
        raise UserError(f"'{folder}' is in use by {who}; wait until it ends, or stop it.") from error
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> dict[str, Any]:
    """Return the recorded holder of a folder's lock, {} where the record is missing or incomplete."""
    try:
        holder = read_json(folder / HOLDER, "holder")
    except UserError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives(pid: object) -> bool:
    """Return whether a process of this host is running; True where that cannot be found out."""
    if os.name != "posix" or not isinstance(pid, int) or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


@contextmanager
def scratch_beside(folder: Path, stage: str) -> Iterator[Path]:
    """Hold the lock of `folder` and yield an empty scratch folder on its disk, so that moves into `folder` are atomic.

    stage: of the line that is printed where another process holds the lock. Raises OSError where nothing can be written.
    """
    from filelock import FileLock, Timeout

    from vismt.base import console

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
