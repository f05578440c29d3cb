"""Records of a run on disk, one for each episode or example: a line file after a header, resumable and checked when read.

Processes that share an evaluation (ranks.py) have the same rows; the first one reads and writes the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismt.base import console, ranks
from vismt.base.errors import UserError, shown_value
from vismt.base.seeds import digest
from vismt.storage.lines import LineFile, read_lines

_AGAIN = "move the file away to start again."


@dataclass(frozen=True)
class Field:
    """The values that a field of a record may have: finite numbers from `least` to `most`.

    whole: only whole numbers. several: a list of such numbers. bits: a text of 0s and 1s instead. optional: the field may be
    missing.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    several: bool = False
    bits: bool = False
    optional: bool = False

    def fits(self, value: object) -> bool:
        """Return whether a value is one of them."""
        if self.bits:
            return isinstance(value, str) and set(value) <= set("01")
        values: list[Any] = value if self.several and isinstance(value, list) else [value]
        types = (int,) if self.whole else (int, float)
        return all(
            type(number) in types and math.isfinite(number) and self.least <= number <= self.most for number in values
        )


SHARE = Field(0, 1)


class Records:
    """Rows by their field `key` ("episode", "id"), in a file that a later run continues; without a path in memory only.

    Use as a context manager, which syncs the file at its end. The file's first line is {"protocol": hash, "settings":
    settings}. `fields` are those of every row besides `key`. Raises UserError for a file of other settings, one that was
    changed or cannot be written, and one with a row of other fields, values or a repeated key.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, object], fields: Mapping[str, Field], key: str
    ) -> None:
        self.key = key
        self._fields = fields
        self._rows: dict[object, dict] = {}
        self._lines: LineFile | None = None
        if path is not None:
            plain = json.loads(json.dumps(settings))  # tuples as lists, as in the file
            self._rows = ranks.on_first(lambda: self._opened(path, plain))

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
        fault = self._fault(row)
        if fault is not None:
            raise UserError(f"records: a row cannot be kept: {fault}.")
        self._rows[row[self.key]] = row
        if self._lines is not None:
            self._lines.add(row)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._lines is not None and kind is None:
            self._lines.sync()

    def _opened(self, path: Path, settings: Mapping[str, object]) -> dict[object, dict]:
        """Open the file for more rows and return those that it has."""
        protocol = digest(json.dumps(settings, sort_keys=True).encode())
        header, *rows = read_lines(path) or [{"protocol": protocol, "settings": settings}]
        recorded = header.get("settings")
        if recorded != settings:
            known = recorded if isinstance(recorded, dict) else {}
            different = [key for key in settings if key not in known or known[key] != settings[key]]
            raise UserError(
                f"records '{path}' are of another run (different: {', '.join(different) or 'settings'}): "
                "choose another run folder, or move the file away to start again."
            )
        for number, row in enumerate(rows, start=2):
            fault = self._fault(row)
            if fault is not None:
                raise UserError(f"records '{path}': line {number}: {fault}; {_AGAIN}")
            self._rows[row[self.key]] = row
        self._lines = LineFile(path, [header, *rows])
        return self._rows

    def _fault(self, row: Mapping[str, object]) -> str | None:
        """Return what is wrong with a row that is not among the rows yet, None for a sound one."""
        name = row.get(self.key)
        if type(name) not in (int, str):
            return f"{self.key} is {shown_value(name)}"
        if name in self._rows:
            return f"{self.key} {shown_value(name)} comes twice"
        unknown = sorted(row.keys() - self._fields.keys() - {self.key})
        if unknown:
            return f"'{unknown[0]}' is not a field of these records"
        for field, values in self._fields.items():
            if field not in row:
                if not values.optional:
                    return f"'{field}' is missing"
            elif not values.fits(row[field]):
                return f"'{field}' is {shown_value(row[field])}, which it cannot be"
        return None


def begun_on(path: Path | None, content: str) -> str:
    """Return which images the records in a file have begun with, and say where these are not those of `content`.

    content: of the present images, as of `vismt.data.batching.Images`, "" if they have none.
    """
    begun = recorded_settings(path)
    examples = content if begun is None else str(begun.get("examples", ""))
    if examples and content not in ("", examples):
        console.stage("eval", f"'{path}' is of other images than are there now; move it away to evaluate these")
    return examples


def recorded_settings(path: Path | None) -> Mapping[str, object] | None:
    """Return the settings of the records in a file, None where there are none."""
    lines = ranks.on_first(lambda: read_lines(path)[:1]) if path is not None else []
    settings = lines[0].get("settings") if lines else None
    return settings if isinstance(settings, dict) or not lines else {}
