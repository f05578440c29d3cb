"""metrics.jsonl: one line for each logged step, readable with `cat`; accelerate's trackers are used as well where configured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from vismt.errors import UserError
from vismt.files import atomic_write

METRICS = "metrics.jsonl"


def read_lines(path: Path, needed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a torn last line is dropped, and a missing file has no rows.

    Raises UserError for a file that cannot be read, a line that is not a JSON object and a row without a `needed` key.
    """
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict) or not set(needed) <= set(rows[-1]):
                    raise UserError(
                        f"'{path}' line {number} lacks {', '.join(needed) or 'keys'}; the file was changed by hand."
                    )
        except UserError:
            raise
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"'{path}' line {number} is not JSON; the file was changed by hand.") from error
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the whole file atomically."""
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


class MetricsLog:
    """Append rows to metrics.jsonl; when a run resumes, rows after its checkpoint are dropped."""

    def __init__(self, folder: Path, finished_steps: int, enabled: bool) -> None:
        self.path = folder / METRICS
        self.enabled = enabled
        if enabled:
            write_lines(self.path, [row for row in read_lines(self.path, ("step",)) if row["step"] <= finished_steps])

    def elapsed(self) -> float:
        """Return the seconds of training that earlier sessions of this run have logged."""
        rows = read_lines(self.path, ("elapsed_s",)) if self.enabled else []
        return float(rows[-1]["elapsed_s"]) if rows else 0.0

    def add(self, row: dict[str, float]) -> None:
        """Write one line and flush it; values that are not finite are written as null."""
        if not self.enabled:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write '{self.path}': {error.strerror}. Free space, then run again: it resumes."
            ) from error


def record_stem(data: str, protocol: str, model: str) -> str:
    """Return the stem of the file with a model's records: letters, digits, dots and hyphens."""
    return re.sub(r"[^\w.-]", "-", "-".join((data, protocol, model)))
