"""One image file to one uint8 RGB tensor, whatever its mode; a file that is no image names itself."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vismt.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# What Pillow raises for damaged input, depending on the format.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def is_image_name(path: Path) -> bool:
    """Whether the file name says image: a known suffix and no leading dot (such as the ._x.jpg of archives)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def to_rgb(image: Image.Image) -> Tensor:
    """uint8 (3, h, w) of any Pillow mode.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled by 1 / 257 (65535 -> 255).
    Raises ValueError for float images, whose range is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        grey = ((deep.clip(0, 65535) + 128) // 257).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    if image.mode == "F":
        raise ValueError("float image of unknown range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def decode_bytes(data: bytes, shown: str) -> Tensor:
    """uint8 (3, h, w) of an encoded image; UserError naming `shown` when it is truncated, corrupt or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except DAMAGED as error:
        size = f"{len(data):,} bytes"
        reason = "no image format is recognised" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(
            f"{shown}: cannot be decoded ({size}: {reason}). Replace the file, or set on_bad_sample=skip."
        ) from error


def decode_file(path: Path) -> Tensor:
    """uint8 (3, h, w) of an image file; UserError naming the file when it cannot be read or decoded."""
    return decode_bytes(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or a UserError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
