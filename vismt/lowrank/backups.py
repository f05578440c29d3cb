"""Copies of tensors that are rarely read again: small ones in memory, large ones in a temporary file that is mapped.

The file has no name left once it is mapped, so it goes with the last tensor in it; its pages are the system's to drop and
to read again, and none of them is on an accelerator. Where TMPDIR lies in memory, so do the copies.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from vismt.errors import UserError

IN_MEMORY = 2**26  # bytes
ALIGNED = 16


def set_aside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor by name: where it is, or on the CPU in a file when all take more than 64 MiB.

    Raises UserError when the temporary folder has no room for them; nothing is left behind then.
    """
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items() if not value.is_meta}
    if sum(sizes.values()) <= IN_MEMORY:
        return {name: value.detach().clone() for name, value in tensors.items()}
    starts: dict[str, int] = {}
    path = None
    try:
        handle, path = tempfile.mkstemp(prefix="vismt-originals-")
        with os.fdopen(handle, "wb") as file:
            for name in sizes:
                starts[name] = file.tell()
                file.write(_bytes(tensors[name]).numpy())
                file.write(b"\0" * (-file.tell() % ALIGNED))
            whole = file.tell()
        # Private: who writes into a copy writes into memory, never into the file.
        mapped = torch.from_file(path, shared=False, size=whole, dtype=torch.uint8)
    except OSError as error:
        raise UserError(
            f"adapt: no room for the {sum(sizes.values()) / 2**20:,.0f} MiB of original weights in '{tempfile.gettempdir()}' "
            f"({error.strerror or error}). Point TMPDIR at a folder with more."
        ) from error
    finally:
        if path is not None:
            os.unlink(path)
    return {
        name: mapped[starts[name] : starts[name] + sizes[name]].view(value.dtype).view(value.shape)
        if name in sizes
        else value.detach().clone()
        for name, value in tensors.items()
    }


def same_bits(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the copies whose tensor still holds every bit of theirs, sorted."""
    return sorted(name for name, value in copies.items() if torch.equal(_bytes(value), _bytes(tensors[name])))


def _bytes(tensor: Tensor) -> Tensor:
    """On the CPU, flat, as uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
