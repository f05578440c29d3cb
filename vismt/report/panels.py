"""Files that pictures of images are drawn from: arrays in an .npz without pickles, written atomically."""

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
from vismt.storage.paths import read_bytes


def read_panel(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name. Raise UserError for a file that is missing or damaged."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"report: '{path}' is not a panel ({error}); delete it and evaluate the run again.") from error


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
