"""The cache folder.

Before a file is written, the least recently used files make room for it, and vismt's files can be deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.storage.files import PARTIAL

_warned_folders: set[Path] = set()
_HEX = "[0-9a-f]" * 20
# Folder -> what it holds, and the names of vismt's own files. VISMT_CACHE may name a folder with files of the user. Only names
# that end in a digest, or that a library makes, surely belong to vismt.
STORES = {
    "pixels": ("decoded images, named by a digest", (f"*-{_HEX}*.npy", "tmp????????.part")),
    "features": ("features of frozen models, named by a digest", (f"{_HEX}*.safetensors",)),
    "experts": ("clusters of neurons, named by a digest", (f"{_HEX}*.safetensors",)),
    "listings": ("lists of methods, named by a digest", (f"{_HEX}*.json",)),
    "robustbench": ("weights that RobustBench fetched", ("cifar10/*/*.pt", "cifar100/*/*.pt", "imagenet/*/*.pt")),
}
# Folders of downloads. Each NAME has the lock file .NAME.lock of `scratch_beside` beside it.
DOWNLOADS = ("assets", "torchvision", "wheels")


@dataclass(frozen=True)
class Deletable:
    """Files that vismt wrote into `folder`, and folders that it filled.

    why: What the files are, and how vismt recognises them as its own.
    """

    folder: Path
    paths: tuple[Path, ...]
    why: str

    @property
    def size(self) -> int:
        """Number of bytes of all files."""
        files = [file for path in self.paths for file in (path.rglob("*") if path.is_dir() else [path])]
        return sum(file.lstat().st_size for file in files)

    def delete(self) -> None:
        """Delete the files, and the folder if nothing else is in it. Raise UserError if the system refuses."""
        for path in self.paths:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot delete '{path}': {error.strerror or error}. Delete it as its owner."
                ) from error
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()


def deletable(root: Path) -> Iterator[Deletable]:
    """Yield what vismt has put into each folder of the cache folder `root`. No symbolic link is followed or deleted."""
    for name, (what, patterns) in STORES.items():
        found = [
            path
            for pattern in (*patterns, f".*{PARTIAL}")
            for path in (root / name).glob(pattern)
            if _inside(path, root)
        ]
        if files := tuple(path for path in sorted(found) if path.is_file()):
            yield Deletable(root / name, files, f"{len(files):,} file(s) of {what}; made or fetched again when needed")
    for name in DOWNLOADS:
        locks = [path for path in sorted((root / name).glob(".*.lock")) if _inside(path, root)]
        names = [lock.name[1:-5] for lock in locks]
        fetched = [pattern for text in map(escape, names) for pattern in (text, f".{text}.part-*")]
        found = [path for pattern in fetched for path in (root / name).glob(pattern) if _inside(path, root)]
        if folders := tuple(path for path in found if path.is_dir()):
            why = f"fetched by vismt, by the lock files that it left: {', '.join(names)}; fetched again when needed"
            yield Deletable(root / name, (*folders, *locks), why)


def _inside(path: Path, root: Path) -> bool:
    """Return whether neither `path` nor a folder between it and `root` is a symbolic link."""
    return not any(part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(root) and part != root)


def make_room(path: Path, size: int, limit: int) -> None:
    """Delete vismt's least recently used files from the folder of `path` until they can have `size` more bytes within `limit`.

    Files that are being written have another suffix and are left alone. So are the user's files.
    """
    files = []
    for other in path.parent.glob(next(name for name in STORES[path.parent.name][1] if name.endswith(path.suffix))):
        try:
            about = other.stat()
        except FileNotFoundError:  # another process has deleted it
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
    """Mark a file as the most recently used one, if it still exists and can be written."""
    with suppress(OSError):
        os.utime(path)


def note_no_room(folder: Path, what: str, error: Exception) -> None:
    """Print that a cache is not written, and how the run goes on. The notice comes once for each process and folder."""
    if folder not in _warned_folders:
        _warned_folders.add(folder)
        console.stage("cache", f"{what}: {error}")
