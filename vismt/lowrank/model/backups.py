"""Copies of tensors that are rarely read again: small ones in memory, large ones in a temporary file that is mapped.

The file has no name once it is mapped, so it disappears with the last tensor in it; the system may drop its pages and read
them again, and none is on an accelerator. Where TMPDIR lies in memory, so do the copies.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from vismt.base.errors import UserError

IN_MEMORY = 2**26  # bytes
SAMPLES = 1024  # values of a tensor that tell whether it was trained
ALIGNED = 16


def backup_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of each tensor by name: on its device, or in a file on the CPU where all take more than 64 MiB.

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
            size = file.tell()
        # Private: writing into a copy writes into memory, never into the file.
        mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
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


def unchanged_tensors(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of the tensors that still equal their copies, bit for bit."""
    return sorted(name for name, value in copies.items() if torch.equal(_bytes(value), _bytes(tensors[name])))


def sample(tensor: Tensor) -> Tensor:
    """Return a copy of at most 2048 values spread over a tensor, on the CPU."""
    # An odd stride does not stay in one column of a matrix of even width.
    return tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES) | 1].cpu().clone()


def was_trained(sampled: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor differs from what it was when `sampled` was taken, but for a cast."""
    now = sample(tensor)
    return now.shape != sampled.shape or not torch.equal(now, sampled.to(now.dtype))


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: on the CPU, flat, uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
