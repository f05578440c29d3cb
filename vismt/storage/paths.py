"""Folders: the user's data, the cache, and the cards that come with the package."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import stat
from pathlib import Path, PurePosixPath

from vismt.base.errors import UserError

MOST_BYTES = 2**30  # bytes of a file that is read whole

CHECKOUT = Path(__file__).resolve().parents[2]


def data_roots() -> list[Path]:
    """Return the folders of `VISMT_DATA` in order. Several folders are separated as in PATH."""
    roots = [Path(name).expanduser() for name in os.environ.get("VISMT_DATA", "").split(os.pathsep) if name]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"VISMT_DATA: '{root}' is not a folder: set it to the folder of your data sets.")
    return roots


def cache_root() -> Path:
    """Return `VISMT_CACHE`, or ~/.cache/vismt. The folder is not created."""
    return Path(os.environ.get("VISMT_CACHE", "~/.cache/vismt")).expanduser()


def shipped(folder: str) -> Path:
    """Return the folder `datasets` or `configs`: beside the package in a checkout, otherwise in the wheel's shared files.

    The shared files are in share/vismt/<folder>, in the first folder above the package that has one: the environment, the
    user's own prefix, or the target of `pip install --target`.
    """
    beside = CHECKOUT / folder
    if beside.is_dir():
        return beside
    places = [parent / "share" / "vismt" / folder for parent in (CHECKOUT, *CHECKOUT.parents)]
    return next((place for place in places if place.is_dir()), places[0])


def list_cards() -> list[str]:
    """Return the names of the cards that come with the package, sorted."""
    return sorted(path.parent.name for path in shipped("datasets").glob("*/card.yaml"))


def package_folder(module: str) -> Path | None:
    """Return the folder of an installed Python package without importing it. Return None if it is not installed."""
    spec = importlib.util.find_spec(module)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def stays_inside(path: str) -> bool:
    """Return whether `path` is relative and stays inside its folder, on every system."""
    pure = PurePosixPath(path)
    plain = not any(character in path for character in "\\\0:")
    return bool(path) and plain and not pure.is_absolute() and ".." not in pure.parts


def file_name(text: str) -> str:
    """Return a text in the form that names of files have: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^\w.-]", "-", text)


def regular_file(path: Path) -> Path:
    """Return `path`. Raise OSError, without opening it, for a folder, named pipe, socket or device, also behind a link."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
        kind = next((text for test, text in kinds.items() if test(mode)), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return path


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file. Raise OSError like `regular_file`, and for a file of more than `most` bytes."""
    size = regular_file(path).stat().st_size
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {most:,} are read", str(path))
    return path.read_bytes()
