"""Decoding of image files of any mode to uint8 RGB tensors, with errors that name the file."""

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
    """Return whether a file name has the suffix of an image and no leading dot (such as ._x.jpg in archives)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def to_rgb(image: Image.Image) -> Tensor:
    """Return an image of any Pillow mode as uint8 (3, h, w).

    EXIF orientation is applied; transparency is composited over white; 16-bit grey is scaled by 1 / 257 (65535 -> 255).

    Raises:
        ValueError: a float image, whose range is unknown.
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
    """Return an encoded image as uint8 (3, h, w). Raises UserError, with `shown`, for data that is truncated or not an image."""
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
    """Return an image file as uint8 (3, h, w). Raises UserError, with the file, when it cannot be read or decoded."""
    return decode_bytes(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raises UserError, with the file, when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
