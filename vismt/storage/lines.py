"""Line files: JSON objects, one a line. Each line has a checksum that continues the checksum of the line before.

    {"step": 1, "loss": 0.5, "checksum": "1f0c2d3e"}

A last line without its newline was cut short and is dropped. A file that was written whole marks its last line by "last": true.
It is refused if it was cut. Every other difference from what was written (a changed, missing or moved line) is refused with the
file's name and the line's number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from vismt.base.errors import UserError
from vismt.storage.files import NO_TYPES, JsonObject, Types, atomic_write, cannot_write, misfit, parse_json
from vismt.storage.paths import read_bytes

_END = re.compile(rb'(?:, )?"checksum": "([0-9a-f]{8})"(, "last": true)?\}\Z')
_END_BYTES = 39  # of the longest end. A search of the whole line would be slow
_LAST = b', "last": true'


def read_lines(path: Path, needed: Types = NO_TYPES, may: Types = NO_TYPES, *, whole: bool = False) -> list[JsonObject]:
    """Return the rows of a line file. A missing file has none.

    whole: Whether the file was written whole, by `write_lines`. needed, may: See `misfit`.

    Raise UserError for a file that cannot be read, a line that is not as it was written, a row with other content than a run
    writes, and a `whole` file that was cut.
    """
    try:
        *lines, _ = read_bytes(path).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}).") from error
    ends = [_END.search(line, max(0, len(line) - _END_BYTES)) for line in lines]
    rows = []
    checksum = b""
    for number, (line, end) in enumerate(zip(lines, ends, strict=True), 1):
        row = None
        if end is not None and end[1] == _checksum(checksum, line[: end.start()]):
            checksum = end[1]
            with suppress(ValueError):  # a line that does not hold a JSON object
                row = parse_json(line[: end.start()] + b"}")
        if row is None:
            raise UserError(f"'{path}' line {number} was changed or damaged; move the file away and make it again.")
        fault = misfit(row, needed, may)
        if fault is not None:
            raise UserError(
                f"'{path}' line {number} does not have the content that a run writes: {fault}; move the file away and make it "
                "again."
            )
        rows.append(row)
    if whole and ends and not (ends[-1] and ends[-1][2]):
        raise UserError(f"'{path}' was cut after line {len(rows)}; move the file away and make it again.")
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write the whole file atomically. The last line is marked, so that a cut file is noticed."""
    lines, _ = _encoded(rows, b"")
    atomic_write(path, lines[:-2] + _LAST + lines[-2:] if lines else lines)


class LineFile:
    """A line file that grows. It is written with the rows it has, and then line by line.

    The constructor and `add` raise UserError if the file cannot be written.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, object]]) -> None:
        self.path = path
        lines, self._checksum = _encoded(rows, b"")
        atomic_write(path, lines)

    def add(self, *rows: Mapping[str, object]) -> None:
        """Append rows in one call of the system. If a full disk cuts a line short, the line is dropped when the file is read."""
        payload, self._checksum = _encoded(rows, self._checksum)
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(payload) != len(payload):
                    raise OSError("the disk is full")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def sync(self) -> None:
        try:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _encoded(rows: Iterable[Mapping[str, object]], checksum: bytes) -> tuple[bytes, bytes]:
    """Return rows as lines that continue a line with this checksum, and the checksum of the last row."""
    lines = []
    for row in rows:
        text = json.dumps(row).encode()[:-1]
        checksum = _checksum(checksum, text)
        lines.append(text + (b", " if row else b"") + b'"checksum": "' + checksum + b'"}\n')
    return b"".join(lines), checksum


def _checksum(previous: bytes, text: bytes) -> bytes:
    """Return the checksum of a line without its closing brace, given the checksum of the line before."""
    return hashlib.blake2b(previous + text, digest_size=4).hexdigest().encode()
