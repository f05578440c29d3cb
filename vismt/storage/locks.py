"""Locks of folders that one process at a time may fill: run folders while they are written, and scratch folders of downloads.

The system frees a lock when its process ends in any way, so no lock outlives a killed process.
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

from vismt.base.errors import UserError
from vismt.storage.files import JsonObject, atomic_write, cannot_write, check_name, read_json

LOCK, HOLDER = ".lock", ".lock-holder"
# Seconds in which the worker processes of a killed process end. Their end frees its lock.
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
    except OSError:  # this user cannot write to the folder
        return False
    return False


@contextmanager
def locked(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock of a folder. One process at a time has it. A missing folder is made.

    The host and process of the holder are recorded beside the folder. Another holder is waited for `wait_s` seconds, or without
    a limit if `wait_s` is negative. Then UserError names the holder.
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


def _holder(folder: Path) -> JsonObject:
    """Return the recorded holder of a folder's lock. Return {} if the record is missing or incomplete."""
    try:
        holder = read_json(folder / HOLDER, "holder")
    except UserError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives(pid: object) -> bool:
    """Return whether a process of this host is running. If that cannot be found out, return True."""
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

    stage: Name of the stage in the line that is printed if another process holds the lock. Raise OSError if nothing can be
    written.
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
        # Left by killed processes, because no other process holds the lock.
        for leftover in root.glob(f".{escape(folder.name)}.part-*"):
            rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder.name}.part-") as scratch:
            yield Path(scratch)
    finally:
        lock.release()
