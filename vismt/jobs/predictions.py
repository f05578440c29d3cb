"""What `vismt predict` takes and writes in every job of images: the image files, and predictions.csv with classes of images.

A row of predictions.csv is the answer of one task for one image: the likeliest class, the next ones, their probabilities, and,
where the run has the thresholds of `evaluate.risk`, the conformal set as a JSON list.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.decode import SUFFIXES
from vismt.storage.files import atomic_write

TABLE = "predictions.csv"
LIKELIEST = 5  # classes of a row
Row = dict[str, str | float]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of `paths`, of a folder the image files in it, sorted by name.

    Raises UserError for a folder without one.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise UserError(
                f"predict: '{path}' has no image file ({', '.join(sorted(SUFFIXES))}); name another folder."
            )
        files += found
    return files


def class_row(image: Path, task: str, log_p: Tensor, names: Sequence[str], quantile: float | None) -> Row:
    """Return the row of one image.

    Args:
        image: its file.
        task: name of the task that answers.
        log_p: log-probabilities (k,) of the classes.
        names: of the k classes.
        quantile: largest -log p of a class in the conformal set; None for no set.
    """
    order = log_p.argsort(descending=True, stable=True).tolist()
    row: Row = {"image": str(image), "task": task}
    for place, label in enumerate(order[:LIKELIEST], 1):
        ending = "" if place == 1 else f"_{place}"
        row |= {f"label{ending}": names[label], f"probability{ending}": float(log_p[label].exp())}
    if quantile is not None:
        row["set"] = json.dumps([names[label] for label in order if -log_p[label] <= quantile], ensure_ascii=False)
    return row


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays as a compressed .npz file and return its path."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())
    return path


def write_rows(rows: Sequence[Row], target: Path) -> Path:
    """Write the rows of all images to <target>/predictions.csv and return its path."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(target / TABLE, text.getvalue())
    return target / TABLE
