"""Files that pictures of images are drawn from: arrays of a known layout in an .npz without pickles, written atomically."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.storage.files import atomic_write
from vismt.storage.paths import MOST_BYTES, read_bytes

# Kind of panel -> array -> type and axes. An axis has one length in all arrays of a file: "3" is three, "1" one, "z" may be zero.
# "?": may be NaN.
_LAYOUTS = {
    "examples": {
        "images": ("uint8", "n3hw"),
        "truth": ("str", "n"),
        "tasks": ("str", "n"),
        "arms": ("str", "a"),
        "predictions": ("str", "an"),
    },
    "routers": {
        "images": ("uint8", "n3hw"),
        "omega": ("float16", "bnerc"),
        "blocks": ("int64", "b"),
        "depth": ("int64", ""),
    },
    "confusion": {
        "classes": ("str", "k"),
        "answers": ("str", "c"),
        "arms": ("str", "a"),
        "counts": ("int64", "akc"),
        "name": ("str", "1"),
    },
    "broken": {
        "images": ("uint8", "n3hw"),
        "attacked": ("uint8", "n3hw"),
        "truth": ("str", "n"),
        "clean_answers": ("str", "n"),
        "attacked_answers": ("str", "n"),
    },
    "maps": {
        "images": ("uint8", "n3hw"),
        "ids": ("str", "n"),
        "tasks": ("str", "t"),
        "metrics": ("str", "t"),
        "shares": ("bool", "t"),
        "lower_is_better": ("bool", "t"),
        "truth": ("uint8", "tn3hw"),
        "arms": ("str", "a"),
        "trainings": ("str", "a"),
        "trained": ("bool", "at"),
        "predictions": ("uint8", "atn3hw"),
        "scores": ("float64?", "atn"),
        "classes": ("str", "z"),
        "colors": ("str", "z"),
    },
}


# Errors that reading a damaged file of arrays raises.
DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name. Raise one of DAMAGE for a damaged file."""
    with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
        size = sum(part.file_size for part in file.zip.infolist())
        if size > MOST_BYTES:  # a kilobyte of a zip can stand for a megabyte
            raise ValueError(f"its arrays have {size:,} bytes, at most {MOST_BYTES:,} are read")
        return {name: file[name] for name in file.files}


def read_panel(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Return the arrays of a panel of _LAYOUTS. Raise UserError for a file that is missing, damaged or of another kind."""
    try:
        return _checked(read_arrays(path), kind)
    except DAMAGE as error:
        raise UserError(
            f"report: '{path}' is not a panel of {kind} ({error}); delete it and evaluate the run again."
        ) from error


def write_panel(path: Path, kind: str, arrays: dict[str, np.ndarray]) -> Path:
    """Write the arrays of a panel and return `path`.

    Raise UserError for arrays that do not fit the layout. Nothing is written then.
    """
    try:
        checked = _checked(arrays, kind)
    except ValueError as error:
        raise UserError(f"{kind}: {error}; nothing is written to '{path}'.") from error
    return write_arrays(path, checked)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write arrays as a compressed .npz file and return its path."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())
    return path


def spread(total: int, count: int) -> Tensor:
    """Return int64 (min(total, count),): positions evenly over 0 .. total - 1, ascending, none twice."""
    kept = min(total, count)
    return (2 * torch.arange(kept) + 1) * total // (2 * kept)


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images in [0, 1] as uint8 of the same shape."""
    return images.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


def _checked(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Return the arrays. Raise ValueError with the name of an array that does not fit the layout."""
    lengths: dict[str, int] = {"3": 3, "1": 1}
    for name, (kind_of_values, axes) in _LAYOUTS[kind].items():
        array, dtype = arrays[name], kind_of_values.rstrip("?")
        fits = array.dtype.kind == "U" if dtype == "str" else array.dtype == dtype
        if not fits or array.ndim != len(axes) or (0 in array.shape and axes != "z"):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, needed {dtype} ({', '.join(axes)})")
        for axis, length in zip(axes, array.shape):
            if lengths.setdefault(axis, length) != length:
                raise ValueError(f"{name} is {array.shape} on ({', '.join(axes)}), needed {lengths[axis]} for {axis}")
        if array.dtype.kind == "f" and dtype == kind_of_values and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    return arrays
