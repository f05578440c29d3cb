"""Outputs of commands: no command writes over a file of the user or over one of its inputs, or writes a file twice.

Commands call `check_outputs` before their work begins. In a folder that the user names, a command lists its files in NOTE
before it writes the first of them. The same command may replace these files later, even after it was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from vismt.base.errors import UserError
from vismt.storage.files import PARTIAL, atomic_write, check_name, read_json

NOTE = "vismt.json"
LONGEST = 255 - len(f"..12345678{PARTIAL}")  # bytes of a file's name (the name is longer until the file is whole)


def check_outputs(
    command: str,
    outputs: Iterable[tuple[Path, str]],
    inputs: Iterable[Path] = (),
    own: Collection[Path] = (),
    option: str = "--to",
) -> None:
    """Raise UserError for an output that is another output or an input, or that exists and does not belong to vismt.

    An output whose name is too long for a file is an error too.

    Args:
        command: Name of the command, for the message.
        outputs: Files that are to be written, each with its source ("" if the name says it).
        inputs: Files that the command reads.
        own: Files that vismt wrote before and may replace.
        option: Option that names another place for the outputs.
    """
    read = set(filter(None, map(_identity, inputs)))
    sources: dict[str, str] = {}
    for path, source in outputs:
        check_name(path)
        key = os.path.normcase(path)
        if key in sources:
            raise UserError(
                f"{command}: '{sources[key]}' and '{source}' would both become {path.name}; give one of them another {option}."
            )
        sources[key] = source
        if read and _identity(path) in read:
            raise UserError(
                f"{command}: '{path}' is an input and would be replaced by an output; give another {option}."
            )
        if path not in own and os.path.lexists(path):
            raise UserError(
                f"{command}: '{path}' exists and would be overwritten; give another {option}, or move the file away."
            )
        if len(os.fsencode(path.name)) > LONGEST:
            raise UserError(
                f"{command}: the output '{path.name}' needs a shorter name; rename '{source or path.parent}'."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and the inode of a file, which are the same under each of its names. A missing file has None."""
    with suppress(OSError, ValueError):  # a ValueError comes from a null character
        about = path.stat()
        return about.st_dev, about.st_ino
    return None


def check_folder_outputs(
    command: str, folder: Path, outputs: Iterable[tuple[str, str]], inputs: Iterable[Path] = ()
) -> None:
    """Check the outputs of a command in a folder, given by name as for `check_outputs`.

    The command may replace the files of its note.
    """
    own = {folder / name for name in _names(noted(folder), command)}
    check_outputs(command, [(folder / name, source) for name, source in outputs], inputs, own)


def check_folder(command: str, folder: Path, option: str = "--to") -> None:
    """Raise UserError for a folder with files that this command did not write, unless they are hidden."""
    if command not in noted(folder):
        found = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
        check_outputs(command, [(path, "") for path in found], option=option)


def note_outputs(command: str, folder: Path, names: Iterable[str] = ()) -> None:
    """List the files of a command in a folder, before the first of them is written. No names stand for the whole folder."""
    held = noted(folder)
    content = {**held, command: sorted({*_names(held, command), *names})}
    atomic_write(folder / NOTE, json.dumps(content, indent=1) + "\n")


def noted(folder: Path) -> dict[str, object]:
    """Return the note of a folder. It is empty if the folder has none."""
    path = folder / NOTE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; name a folder.")
    held = read_json(path, f"folder '{folder}'") if os.path.lexists(path) else {}
    if not isinstance(held, dict):
        raise UserError(f"folder '{folder}': {NOTE} is not what vismt writes there; name another folder.")
    return held


def _names(held: dict[str, object], command: str) -> list[str]:
    names = held.get(command)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
