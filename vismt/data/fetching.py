"""Download sets: a whole copy is fetched beside its folder, then moved into place, as a whole or file by file.

A reader sees an old file or the whole new file. A folder of the user gets the files that it lacks. In the cache, files that
differ are replaced too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from glob import escape
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.copies import shown_path
from vismt.data.source_types import Card, DataSource
from vismt.storage.locks import scratch_beside
from vismt.storage.paths import cache_root

ARCHIVES = (".gz", ".tgz", ".tar", ".zip", ".mat")


def fetch(card: Card, source: DataSource, base: Path, complete: Callable[[], bool]) -> None:
    """Download a set into the folder `base`, unless `complete()` is true once no other process fetches it."""
    try:
        with scratch_beside(base, "data") as scratch:
            if complete():
                return
            new = scratch / base.name
            new.mkdir()
            for archive in _files(base):
                if archive.suffix in ARCHIVES:  # archives with the right checksum are not downloaded again
                    target = new / archive.relative_to(base)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(archive, target)
            source.download(card, new)
            _put(new, base)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{card.shown}: '{shown_path(base)}' cannot be written ({reason}); set VISMT_CACHE.") from error
    console.stage("data", f"{card.name}   fetched into {shown_path(base)}")


def has_leftovers(base: Path) -> bool:
    """Return whether a process that fetched into `base` was killed, or is at work."""
    return any(base.parent.glob(f".{escape(base.name)}.part-*"))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _put(new: Path, base: Path) -> None:
    if not base.exists():
        os.replace(new, base)
        return
    replaces = base.is_relative_to(cache_root())
    for path in _files(new):
        target = base / path.relative_to(new)
        if replaces or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
