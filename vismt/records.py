"""Records of a run on disk, one for each episode or example: JSON lines after a header, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.seeds import digest


class Records:
    """Rows by their field `key` ("episode", "id"), in a file that a later run continues.

    Use as a context manager. The file's first line is {"protocol": hash, "settings": settings}. A last line without its
    newline was interrupted and is dropped.

    Args:
        path: The file; None keeps the rows in memory only.
        settings: JSON-able description of the run. A file with other settings is refused.
        fields: Numeric fields of every row.
        key: The field that identifies a row.

    Raises:
        UserError: A file of another run or with a broken line, or a file that cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object], fields: Sequence[str], key: str) -> None:
        self.path, self.key = path, key
        self._rows: dict[object, dict] = {}
        self._log: BinaryIO | None = None
        if path is not None:
            plain = json.loads(json.dumps(settings))  # tuples as lists, as in the file
            self._rows = {row[key]: row for row in _read(path, plain, key, fields)}

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: object) -> dict:
        return self._rows[name]

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict) -> None:
        """Add `row` in memory and on disk; a row with a key that is present already is ignored."""
        if row[self.key] in self._rows:
            return
        self._rows[row[self.key]] = row
        if self._log is not None:
            _append(self._log, row)

    def __enter__(self) -> Records:
        if self.path is not None:
            # Unbuffered: a write fails here and not when the file is closed.
            self._log = self.path.open("ab", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def _append(log: BinaryIO, row: Mapping[str, object]) -> None:
    """Write a line in a single call; a line that a full disk cut short is dropped when the run is continued."""
    line = (json.dumps(row) + "\n").encode()
    try:
        written = log.write(line)
    except OSError as error:
        raise UserError(f"cannot write '{log.name}': {error.strerror or error}. Earlier records are kept.") from error
    if written != len(line):
        raise UserError(f"cannot write '{log.name}': the disk is full. Earlier records are kept.")


def _read(path: Path, settings: dict, key: str, fields: Sequence[str]) -> list[dict]:
    """Return the complete rows of the file and truncate it to them; create a file that does not exist."""
    lines = path.read_text(encoding="utf8", errors="replace").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        protocol = digest(json.dumps(settings, sort_keys=True).encode())
        atomic_write(path, json.dumps({"protocol": protocol, "settings": settings}) + "\n")
        return []
    try:
        header, *rows = [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise UserError(
            f"records '{path}': a line is not JSON ({error}): move the file away to start again."
        ) from error
    recorded = header.get("settings") if isinstance(header, dict) else None
    if recorded != settings:
        differences = [key for key in settings if not isinstance(recorded, dict) or recorded.get(key) != settings[key]]
        raise UserError(
            f"records '{path}' are of another run (different: {', '.join(differences) or 'settings'}): "
            "choose another run folder, or move the file away to start again."
        )
    for number, row in enumerate(rows, start=2):
        whole_row = isinstance(row, dict) and isinstance(row.get(key), int | str)
        if not whole_row or not all(isinstance(row.get(name), int | float) for name in fields):
            raise UserError(f"records '{path}': line {number} is not a record: move the file away to start again.")
    atomic_write(path, "".join(whole))
    return rows
