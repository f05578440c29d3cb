"""Integrity: one sha256 per group of files (a class folder, an npz, a photograph), so that a check can name what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vismt.base.errors import UserError
from vismt.data.decode import read_bytes
from vismt.data.source_types import Card, DataSource, Files, check_names
from vismt.storage.files import atomic_write


@dataclass(frozen=True)
class FileGroup:
    """Number of files and sha256 over their sorted `name, tab, sha256 of the bytes, newline` lines."""

    count: int
    sha256: str


def digest(files: Iterable[tuple[str, Path]]) -> FileGroup:
    """Return the FileGroup of (name, path) pairs, independent of their order."""
    total, count = hashlib.sha256(), 0
    files = sorted(files)
    check_names(name for name, _ in files)
    for name, path in files:
        total.update(f"{name}\t{hashlib.sha256(read_bytes(path)).hexdigest()}\n".encode())
        count += 1
    return FileGroup(count, total.hexdigest())


def read_manifest(card: Card, source: DataSource) -> dict[str, FileGroup]:
    """Return the groups that the card recorded for `source`, none when it recorded nothing."""
    if source.manifest is None:
        return {}
    raw = card.read_json(source.manifest)
    try:
        return {str(group): FileGroup(int(count), str(sha256)) for group, (count, sha256) in raw.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{card.shown}/{source.manifest}: must map a group to [count, sha256].") from error


def write_manifest(path: Path, files: Files) -> dict[str, FileGroup]:
    """Record every group of `files` in the JSON file `path`, one line a group, and return them."""
    groups = {name: digest(files[name]) for name in sorted(files)}
    lines = [f" {json.dumps(name)}: {json.dumps([group.count, group.sha256])}" for name, group in groups.items()]
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return groups
