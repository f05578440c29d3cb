"""metrics.jsonl has one line for each logged step, readable with `cat`. Trackers get the same values."""

from __future__ import annotations

import math
from pathlib import Path

from vismt.base import console
from vismt.storage.lines import LineFile, read_lines
from vismt.storage.paths import file_name

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append rows to metrics.jsonl. If a run resumes, rows after its checkpoint are dropped.

    logged: Last step up to the checkpoint that has a row. elapsed_s: Seconds of training that earlier sessions have logged.
    """

    def __init__(self, folder: Path, finished_steps: int, logged: int, enabled: bool) -> None:
        self._lines: LineFile | None = None
        self.elapsed_s = 0.0
        if enabled:
            rows = read_lines(folder / METRICS, {"step": int, "elapsed_s": float})
            kept = [row for row in rows if row["step"] <= finished_steps]
            if logged and (not kept or kept[-1]["step"] != logged):
                # The rows are on the disk before the checkpoint.
                console.stage("resume", f"'{folder / METRICS}' lacks rows before step {logged + 1}")
            self._lines = LineFile(folder / METRICS, kept)
            self.elapsed_s = float(kept[-1]["elapsed_s"]) if kept else 0.0

    def add(self, row: dict[str, float]) -> None:
        """Write one line. Values that are not finite are written as null."""
        if self._lines is not None:
            self._lines.add({name: value if math.isfinite(value) else None for name, value in row.items()})

    def sync(self) -> None:
        """Sync the lines to the disk, before a checkpoint that continues after them."""
        if self._lines is not None:
            self._lines.sync()


def record_stem(data: str, protocol: str, model: str) -> str:
    """Return the stem of the file with a model's records."""
    return file_name("-".join((data, protocol, model)))
