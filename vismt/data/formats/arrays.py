"""Images in one npz file: uint8 arrays, or bits packed eight to a byte. Nothing in it may be a pickle."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.typed import RelativePath
from vismt.data.copies import digest_files, fix, shown_path
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind

# bytes of the arrays of a file, which stay in memory (a kilobyte of a zip can stand for a megabyte)
MAX_BYTES = 4 * 2**30
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@source_kind("arrays")
@dataclass(frozen=True, kw_only=True)
class ArraysSource(RootedSource, ImageSource):
    """One npz file: `x_<split>`, `y_<split>`, or `x`, `y` for the single split "all".

    Bits are in `x_packed` with `shape`. Names of classes are in `classes`.

    Attributes:
        file: Name of the npz file.
        invert: Whether 255 - value is the image.
    """

    file: RelativePath
    invert: bool = False

    def list_files(self, base: Path) -> Files:
        return file_groups(base, [self.file])

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images of the arrays. Grey images get three equal channels. Ids are `<split>/<row>`."""
        path = base / self.file
        arrays, shown = _open(card, path), shown_path(path)
        classes = [str(name) for name in arrays.get("classes", np.arange(card.classes)).reshape(-1)]
        rows: dict[str, list[ImageRow]] = {}
        for name in splits:
            suffix = "" if name == "all" else f"_{name}"
            images = _images(arrays, f"x{suffix}", shown)
            labels = _labels(arrays, f"y{suffix}", len(images), shown)
            if labels and not 0 <= min(labels) <= max(labels) < len(classes):
                raise UserError(
                    f"{shown}: 'y{suffix}' runs from {min(labels)} to {max(labels)}, but there are {len(classes)} classes."
                )
            rows[name] = [ImageRow(f"{name}/{row:06d}", label, (images, row)) for row, label in enumerate(labels)]

        def read(place: tuple[np.ndarray, int]) -> Tensor:
            images, row = place
            image = 255 - images[row] if self.invert else images[row]
            tensor = torch.from_numpy(np.array(image))
            return tensor.expand(3, -1, -1).contiguous() if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()

        hashed = [(self.file, path)]
        return Listing(classes, rows, read, lambda: f"{digest_files(hashed).sha256}:{self.invert}")


def _open(card: Card, path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{card.shown}: no file '{shown_path(path)}'. {fix(card)}")
    try:
        with zipfile.ZipFile(path) as archive:
            left = MAX_BYTES
            arrays = {}
            for member in archive.infolist():
                with archive.open(member) as file:
                    array = _array(file, left)
                arrays[member.filename.removesuffix(".npy")] = array
                left -= array.nbytes
            return arrays
    except Exception as error:  # zipfile, zlib and NumPy may raise any error for damaged data
        reason = str(error) or type(error).__name__
        raise UserError(f"{shown_path(path)}: cannot be read as npz: {reason}. {fix(card)}") from error


def _array(file: IO[bytes], most: int) -> np.ndarray:
    """Return the array of a member. Memory is taken as its bytes arrive, not as its header claims."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format {version} of an array; (1, 0) and (2, 0) are read")
    shape, by_columns, dtype = HEADERS[version](file)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    if min(shape, default=0) < 0 or size > most:
        raise ValueError(f"an array of shape {shape} has {size:,} bytes; {MAX_BYTES:,} are read in all")
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data):,} of the {size:,} bytes of an array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def _images(arrays: Mapping[str, np.ndarray], key: str, shown: str) -> np.ndarray:
    """Return uint8 (n, h, w) or (n, h, w, 3) under `key`, unpacked from `key_packed` and `shape` (bits become 0 and 255)."""
    if key in arrays:
        images = arrays[key]
    elif f"{key}_packed" in arrays and "shape" in arrays:
        shape = tuple(_labels(arrays, "shape", arrays["shape"].size, shown))
        rows = arrays[f"{key}_packed"]
        bits = math.prod(shape[1:])
        if (
            min(shape, default=-1) < 0
            or rows.size > MAX_BYTES // 8
            or rows.dtype != np.uint8
            or rows.shape != (shape[0], -(-bits // 8))
        ):
            raise UserError(
                f"{shown}: '{key}_packed' is {rows.dtype} {rows.shape}, which does not hold images of shape {shape}."
            )
        images = np.unpackbits(rows, axis=1, count=bits).reshape(shape) * np.uint8(255)
    else:
        raise UserError(f"{shown}: no array '{key}' or '{key}_packed' with 'shape'; it holds {sorted(arrays)}.")
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if images.dtype != np.uint8 or not fits or 0 in images.shape[1:]:
        raise UserError(f"{shown}: '{key}' is {images.dtype} {images.shape}, must be uint8 (n, h, w) or (n, h, w, 3).")
    return images


def _labels(arrays: Mapping[str, np.ndarray], key: str, n: int, shown: str) -> list[int]:
    labels = arrays.get(key)
    if labels is None or labels.shape != (n,) or labels.dtype.kind not in "iu":
        state = "is missing" if labels is None else f"is {labels.dtype} {labels.shape}"
        raise UserError(f"{shown}: '{key}' {state}, must be whole numbers of shape ({n},).")
    return [int(label) for label in labels]
