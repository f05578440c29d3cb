"""Decode image files of any mode to uint8 RGB tensors, with errors that name the file.

Files are opened only here: regular files of raster formats, up to a number of pixels. Pillow would also take formats that run a
program (EPS starts Ghostscript), and would decompress hundreds of kilobytes to gigabytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from vismt.base.errors import UserError
from vismt.storage.paths import regular_file

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64 * 2**20  # decoding an image with transparency takes about 26 bytes a pixel
FIX = "Replace the file, or set on_bad_sample=skip."


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image and no leading dot (such as ._x.jpg in archives)."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def to_rgb(image: Image.Image) -> Tensor:
    """Return an image of any Pillow mode as uint8 (3, h, w). Raise ValueError for a float image, whose range is unknown.

    EXIF orientation is applied, transparency is composited over white, and 16-bit grey is scaled by 1 / 257 (65535 -> 255).
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


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is not loaded yet. 1 means that it is shown as it is stored."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(2, 9) else 1


@contextmanager
def decoding(shown: str, fix: str = FIX, size: str = "") -> Iterator[None]:
    """Turn any error of a decoder for damaged data into a UserError of `shown`, `size`, the reason and `fix`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the decoders of Pillow, NumPy and SciPy may raise any error for damaged data
        usual = isinstance(error, (OSError, ValueError, SyntaxError))
        reason = str(error) if usual and str(error) else f"{type(error).__name__}: {error}"
        raise UserError(f"{shown}: cannot be decoded ({size}{reason}). {fix}") from error


@contextmanager
def open_image(data: bytes, shown: str, fix: str = FIX) -> Iterator[Image.Image]:
    """Yield an encoded image of IMAGE_FORMATS, up to MAX_PIXELS. Only its header is read, for decoding inside the context."""
    with decoding(shown, fix, f"{len(data):,} bytes: "):
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"it is none of {', '.join(IMAGE_FORMATS)}") from error
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded, scale it down")
            yield image


def decode_bytes(data: bytes, shown: str, fix: str = FIX) -> Tensor:
    """Return an encoded image as uint8 (3, h, w). Raise UserError, with `shown`, like `open_image`."""
    with open_image(data, shown, fix) as image:
        return to_rgb(image)


def decode_file(path: Path, fix: str = FIX) -> Tensor:
    """Return an image file as uint8 (3, h, w). Raise UserError, with the file, if it cannot be read or decoded."""
    return decode_bytes(read_image_bytes(path), str(path), fix)


def read_image_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raise UserError, with the file, if it cannot be read or is not a regular file."""
    try:
        return regular_file(path).read_bytes()
    except (OSError, ValueError) as error:  # a ValueError comes from a null character in the name
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
