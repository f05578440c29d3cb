"""The cache folder is bounded: before a file is written, those used longest ago make room for it."""

from __future__ import annotations

from pathlib import Path

from vismt import console

_told: set[Path] = set()


def make_room(path: Path, size: int, limit: int) -> None:
    """Delete the files used longest ago from the folder of `path` until it can have `size` bytes within `limit` in all.

    Files that are being written have another suffix and are left alone.
    """
    files = []
    for other in path.parent.glob(f"*{path.suffix}"):
        try:
            about = other.stat()
        except FileNotFoundError:  # deleted by another process
            continue
        if other != path:
            files.append((about.st_mtime_ns, about.st_size, other))
    taken = size + sum(length for _, length, _ in files)
    for _, length, other in sorted(files):
        if taken <= limit:
            return
        other.unlink(missing_ok=True)
        taken -= length


def note_use(path: Path) -> None:
    """Make a file the one used last, where its folder can be written."""
    try:
        path.touch()
    except OSError:
        return


def note_no_room(folder: Path, what: str, error: Exception) -> None:
    """Print, once a process and folder, that a cache is not written, and how the run goes on."""
    if folder not in _told:
        _told.add(folder)
        console.stage("cache", f"{what}: {error}")
