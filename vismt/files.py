"""Files that are written whole or not at all; damaged ones raise a one-line UserError."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vismt.errors import UserError


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file; a UserError names the file where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: '{path}' cannot be read as JSON ({error}).") from error


def read_tensors(path: Path, what: str) -> tuple[bytes, dict[str, Tensor]]:
    """Return a safetensors file as bytes and tensors; a UserError names the file where it cannot be read."""
    try:
        payload = path.read_bytes()
        return payload, safetensors.torch.load(payload)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{what}: '{path}' is damaged or not a safetensors file ({error}).") from error


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises UserError when the folder cannot be written or the disk is full; the old file is then kept.
    """
    path = Path(path)
    payload = data.encode("utf8") if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write '{path}': {reason}. Free space or choose a folder that can be written."
        ) from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
