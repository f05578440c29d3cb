"""Records on disk, one per episode or example: JSON lines behind a header, resumable, never mixed with another run."""

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
    """Rows by their field `key` ("episode", "id"). `path` None keeps them in memory only.

    settings: JSON-able account of the run; the file's first line is {"protocol": hash, "settings": settings}, and a file
    with other settings is refused. fields: what each row has besides `key`. A last line without its newline was torn and
    is dropped. Use as a context manager; `add` hands one row to the system at once.
    Raises UserError for a file of another run or with a broken line, and when it cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object], fields: Sequence[str], key: str) -> None:
        self.path, self.key = path, key
        self._rows: dict[object, dict] = {}
        self._log: BinaryIO | None = None
        if path is not None:
            plain = json.loads(json.dumps(settings))  # tuples as lists, as the file gives them back
            self._rows = {row[key]: row for row in _read(path, plain, key, fields)}

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: object) -> dict:
        return self._rows[name]

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict) -> None:
        """Keep `row` in memory and on disk; one whose key is already there stays as it was."""
        if row[self.key] in self._rows:
            return
        self._rows[row[self.key]] = row
        if self._log is not None:
            _append(self._log, row)

    def __enter__(self) -> Records:
        if self.path is not None:
            # Unbuffered, so that nothing is left to fail when the file is closed.
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
    """One line, handed to the system at once; a line cut short by a full disk is dropped when the run is continued."""
    line = (json.dumps(row) + "\n").encode()
    try:
        written = log.write(line)
    except OSError as error:
        raise UserError(f"cannot write '{log.name}': {error.strerror or error}. Earlier records are kept.") from error
    if written != len(line):
        raise UserError(f"cannot write '{log.name}': the disk is full. Earlier records are kept.")


def _read(path: Path, settings: dict, key: str, fields: Sequence[str]) -> list[dict]:
    """The complete rows of the file, which afterwards holds its header and exactly these; a new file is begun."""
    lines = path.read_text(encoding="utf8", errors="replace").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        protocol = digest(json.dumps(settings, sort_keys=True).encode())
        atomic_write(path, json.dumps({"protocol": protocol, "settings": settings}) + "\n")
        return []
    try:
        header, *rows = [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise UserError(f"records '{path}': a line is no JSON ({error}): move the file away to start anew.") from error
    seen = header.get("settings") if isinstance(header, dict) else None
    if seen != settings:
        differs = [key for key in settings if not isinstance(seen, dict) or seen.get(key) != settings[key]]
        raise UserError(
            f"records '{path}' are of another run (different: {', '.join(differs) or 'settings'}): "
            "choose another run folder, or move the file away to start anew."
        )
    for number, row in enumerate(rows, start=2):
        whole_row = isinstance(row, dict) and isinstance(row.get(key), int | str)
        if not whole_row or not all(isinstance(row.get(name), int | float) for name in fields):
            raise UserError(f"records '{path}': line {number} is not a record: move the file away to start anew.")
    atomic_write(path, "".join(whole))
    return rows
