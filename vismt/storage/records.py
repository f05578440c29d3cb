"""The record of an evaluation: one line for each example or episode, in a line file after a header.

    {"weights": ..., "examples": ..., "protocol": {...}, "settings": {...}}
    {"id": "digits:test:7", "label": 3, "clean": 3}

An evaluation runs its examples in fixed batches. A batch is on record as a whole or is run again as a whole, and its rows are
functions of the batch alone. The rows therefore do not depend on where an evaluation stopped or on the number of its processes.
Processes that share an evaluation (vismt/base/ranks.py) have the same rows. The first process reads and writes the file.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vismt.base import console, ranks
from vismt.base.errors import UserError, shown_value
from vismt.storage.files import JsonObject
from vismt.storage.lines import LineFile, read_lines

_AGAIN = "move the file away to start again."
Name = int | str
Row = JsonObject
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Field:
    """The values that a field of a record may have: finite numbers from `least` to `most`.

    whole: Whether the numbers are whole. several: Whether the value is a list of such numbers. text: Whether the value is any
    text instead. bits: Whether the value is a text of 0s and 1s instead. array: Array whose type and shape the value has, as
    the text of `array_text`. optional: Whether the field may be missing.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    several: bool = False
    text: bool = False
    bits: bool = False
    array: np.ndarray | None = None
    optional: bool = False

    def fits(self, value: object) -> bool:
        """Return whether the field may have this value."""
        if self.text or self.bits:
            return isinstance(value, str) and (self.text or set(value) <= set("01"))
        if self.array is not None:
            return _array(value, self.array) is not None
        values: list[Any] = value if self.several and isinstance(value, list) else [value]
        types = (int,) if self.whole else (int, float)
        return all(
            type(number) in types and math.isfinite(number) and self.least <= number <= self.most for number in values
        )


SHARE = Field(0, 1)


def array_text(array: np.ndarray) -> str:
    """Return an array as the text of a field, which keeps every bit. The field has its type and shape."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


def array_of(text: object, like: np.ndarray) -> np.ndarray:
    """Return the array of finite numbers of a text of `array_text`. Raise UserError for another text.

    like: Array of its type and shape.
    """
    array = _array(text, like)
    if array is None:
        raise UserError(
            f"records: {shown_value(text)} is not an array of {like.dtype} {like.shape}; move the file away."
        )
    return array


def _array(text: object, like: np.ndarray) -> np.ndarray | None:
    try:
        packed = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        content = zlib.decompressobj().decompress(packed, like.nbytes + 1)
    except (ValueError, zlib.error):
        return None
    if len(content) != like.nbytes:
        return None
    array = np.frombuffer(content, like.dtype).reshape(like.shape).copy()
    return array if np.isfinite(array).all() else None


@dataclass(frozen=True)
class Header:
    """What the rows of a record depend on.

    Args:
        weights: Fingerprint of the evaluated weights.
        examples: Content of the examples, "" if it is not known.
        protocol: Settings by which the examples are asked.
        settings: Conditions and everything else.
    """

    weights: str = ""
    examples: str = ""
    protocol: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)


class Records:
    """Rows by their field `key` ("episode", "id"), in a file that a later run continues. Without a path, the rows stay in memory.

    `fields` are the fields of every row besides `key`. further: Whether rows may have more fields, of any finite value. Raise
    UserError for a file of another header, a file that was changed or cannot be written, and a row with other fields, other
    values or a repeated key. If only the examples of a file differ, the file is read as it is, and a message names the file.
    It is not continued.

    Attributes:
        examples: Content of the examples that the file has begun with.
    """

    def __init__(
        self, path: Path | None, header: Header, fields: Mapping[str, Field], key: str = "id", *, further: bool = False
    ) -> None:
        self.key, self.path = key, path
        self._fields, self._further = fields, further
        self._rows: dict[Name, Row] = {}
        self._lines: LineFile | None = None  # from the first new row on
        self._header: Row = json.loads(json.dumps(asdict(header)))  # tuples become lists, as in the file
        if path is not None:
            self._header, self._rows = ranks.on_first(lambda: self._read(path))
        self.examples: str = self._header["examples"]
        self._changed = bool(header.examples and self.examples) and header.examples != self.examples
        if self._changed:
            console.stage("eval", f"'{path}' is of other examples than are there now; move it away to evaluate these")

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: Name) -> Row:
        return self._rows[name]

    def complete(self, batches: Sequence[Sequence[Name]], run: Callable[[int], Sequence[Row]], label: str) -> list[Row]:
        """Run the batches that are not on record, and return the rows of all examples in their order.

        batches: Names of the examples of each batch. run: Function from the number of a batch to its rows. label: Label of the
        progress bar.
        """
        missing = [number for number, names in enumerate(batches) if any(name not in self for name in names)]
        if 0 < len(missing) < len(batches):
            console.stage("resume", f"{label}: {len(batches) - len(missing)} of {len(batches)} batches are on record")
        if missing:
            done = len(batches) - len(missing)
            self.add_batches(missing, lambda number: (batches[number], run(number)), label, len(batches), done)
        return [self[name] for names in batches for name in names]

    def add_batches(
        self,
        batches: Iterable[Batch],
        run: Callable[[Batch], tuple[Sequence[Name], Sequence[Row]]],
        label: str,
        count: int = 0,
        done: int = 0,
    ) -> list[Row]:
        """Return the rows of all batches.

        run: Function that returns the names of a batch, and its rows if they are not on record. count, done: Numbers of all
        batches and of earlier batches, for the progress bar.
        """
        found: dict[Name, Row] = {}
        with console.bar("eval", label, count, done) as bar:
            for names, rows in ranks.share(batches, run):
                self._add(rows)
                for name in names:
                    if name in found:
                        raise UserError(f"evaluate: the id '{name}' comes twice: give every example a different id.")
                    found[name] = self[name]
                bar.advance()
        if self._lines is not None:
            self._lines.sync()
        return [*found.values()]

    def _add(self, rows: Sequence[Row]) -> None:
        """Add the rows of a batch that are not on record."""
        new = [row for row in rows if row[self.key] not in self._rows]
        if new and self._changed:
            raise UserError(f"records '{self.path}' are of other examples than are there now; {_AGAIN}")
        for row in new:
            fault = self._fault(row)
            if fault is not None:
                raise UserError(f"records: a row cannot be kept: {fault}.")
            self._rows[row[self.key]] = row
        if self.path is None or ranks.rank() > 0 or not new:
            return
        if self._lines is None:
            before = [*self._rows.values()][: -len(new)]
            self._lines = LineFile(self.path, [self._header, *before])
        self._lines.add(*new)

    def _read(self, path: Path) -> tuple[Row, dict[Name, Row]]:
        """Return the header and the rows of the file. If the file is missing, return this header and no rows."""
        begun, *rows = read_lines(path) or [self._header]
        parts = [_parts(header) for header in (begun, self._header)]
        different = [key for key in {**parts[0], **parts[1]} if parts[0].get(key) != parts[1].get(key)]
        if different:
            raise UserError(
                f"records '{path}' are of another run (different: {', '.join(different)}): choose another run folder, or "
                f"{_AGAIN}"
            )
        for number, row in enumerate(rows, start=2):
            fault = self._fault(row)
            if fault is not None:
                raise UserError(f"records '{path}': line {number}: {fault}; {_AGAIN}")
            self._rows[row[self.key]] = row
        return begun, self._rows

    def _fault(self, row: Mapping[str, object]) -> str | None:
        """Return what is wrong with a row that is not among the rows yet. Return None for a sound row."""
        name = row.get(self.key)
        if type(name) not in (int, str):
            return f"{self.key} is {shown_value(name)}"
        if name in self._rows:
            return f"{self.key} {shown_value(name)} comes twice"
        unknown = sorted(row.keys() - self._fields.keys() - {self.key})
        if unknown and not (self._further and all(_is_finite(row[key]) for key in unknown)):
            return f"'{unknown[0]}' is not a field of these records"
        for field_name, values in self._fields.items():
            if field_name not in row:
                if not values.optional:
                    return f"'{field_name}' is missing"
            elif not values.fits(row[field_name]):
                return f"'{field_name}' is {shown_value(row[field_name])}, which it cannot be"
        return None


def _parts(header: Row) -> Row:
    """Return the parts of a header that a file has to share with an evaluation, by name."""
    if not isinstance(header.get("examples"), str):
        return {"header": header}  # other content than an evaluation writes
    mappings = [header.get(name) for name in ("protocol", "settings")]
    shared = {key: value for part in mappings if isinstance(part, dict) for key, value in part.items()}
    return {"weights": header.get("weights"), **shared}


def _is_finite(value: object) -> bool:
    """Return whether all numbers in a value are finite."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
