"""Images of one size, decoded once into a uint8 store: a memory-mapped file in the cache folder, which later runs use."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vismt import console
from vismt.cache import make_room, note_no_room, note_use
from vismt.data.images import ImageSet
from vismt.errors import UserError
from vismt.paths import cache_root

RECIPE = "bilinear-antialias-shorter-side-centre-crop-1"
MEMORY_BYTES = 512 * 2**20
STORE_BYTES = 32 * 2**30  # of all stores together
CHUNK = 64


def square(image: Tensor, size: int) -> Tensor:
    """Return uint8 (3, size, size) of uint8 (3, h, w): the shorter side resized (bilinear, antialiased), then the centre."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    height, width = image.shape[-2:]
    # The longer side is rounded, not cut down as torchvision would: no side becomes 0 and thin images keep their shape.
    scale = size / min(height, width)
    resized = vision.resize(image, [max(size, round(height * scale)), max(size, round(width * scale))], antialias=True)
    return vision.center_crop(resized, [size, size])


class OnDemand:
    """Rows of a store that is too large to keep: each is decoded whenever it is read."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.stack([square(self.images.read(int(i)), self.size).numpy() for i in index])


class Pixels:
    """A set of images as a uint8 store (n, 3, size, size), built once with a progress bar.

    `pixels[index]` is float32 (b, 3, size, size) in [0, 1] for an int64 index (b,).

    The store is a file in the cache folder, named by the content of the images and the size, and used again by the next run.
    The folder takes up to 32 GiB, and the stores used longest ago are deleted first. A set beyond that (ImageNet, QuickDraw)
    is not stored: each image is decoded whenever it is drawn. Where the folder cannot be written, one notice is given and the
    store is kept in memory; one of more than 512 MiB is decoded as it is drawn.

    Args:
        images: the set.
        size: height and width in pixels.
        cache: with False the store is kept in memory, whatever its size.

    Attributes:
        key: a text that differs for any other images or size; None for a set too large to store.

    Raises:
        UserError: a damaged image.
    """

    def __init__(self, images: ImageSet, size: int, *, cache: bool = True) -> None:
        if size < 1:
            raise UserError(f"data '{images.name}': image size {size} must be at least 1.")
        self.images, self.size = images, size
        self.name, self.split, self.classes = images.name, images.split, images.classes
        self.labels, self.ids = images.labels, images.ids
        needed = len(images) * 3 * size * size if cache else 0
        self.store: np.ndarray | OnDemand
        if needed > (STORE_BYTES if images.cached else MEMORY_BYTES):
            console.stage(
                "data", f"{self.name}: {len(images):,} images are decoded as they are drawn, too many to store"
            )
            self.store = OnDemand(images, size)
        elif cache and images.cached:
            self.store = self._on_disk()
        else:
            self.store = self._in_memory()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.raw(index).to(torch.float32).div_(255)

    def raw(self, index: Tensor) -> Tensor:
        """Return the same images as stored: uint8 (b, 3, size, size)."""
        if index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
            raise TypeError(f"index must be whole numbers (b,), is {index.dtype} {tuple(index.shape)}")
        return torch.from_numpy(self.store[index.cpu().numpy()])

    def _rows(self) -> Iterator[np.ndarray]:
        def row(i: int) -> np.ndarray:
            return square(self.images.read(i), self.size).numpy()

        text = f"{self.name} ({self.split}) at {self.size} px"
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
            console.bar("data", text, len(self)) as bar,
        ):
            for start in range(0, len(self), CHUNK):
                stop = min(start + CHUNK, len(self))
                yield np.stack(list(pool.map(row, range(start, stop))))
                bar.advance(stop - start)

    def _in_memory(self) -> np.ndarray:
        store = np.empty((len(self), 3, self.size, self.size), dtype=np.uint8)
        done = 0
        for rows in self._rows():
            store[done : done + len(rows)] = rows
            done += len(rows)
        return store

    @cached_property
    def key(self) -> str | None:
        if isinstance(self.store, OnDemand) or not self.images.cached:
            return None  # reading all files would take longer than any use
        return self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(f"{RECIPE}:{self.size}:{self.images.content()}:{self.ids}".encode()).hexdigest()[:20]

    def _on_disk(self) -> np.ndarray | OnDemand:
        """Return the store as a file, written where it is missing or damaged."""
        path = cache_root() / "pixels" / f"{self.name}-{self.split}-{self.size}-{self._digest()}.npy"
        shape = (len(self), 3, self.size, self.size)
        stored = _opened(path, shape)
        if stored is None:
            try:
                self._write(path, shape)
            except OSError as error:
                large = math.prod(shape) > MEMORY_BYTES
                how = "decoded as they are drawn" if large else "kept in memory"
                reason = f"'{path}': {error.strerror or error}. Free space or set VISMT_CACHE."
                note_no_room(path.parent, f"decoded images are {how}", OSError(reason))
                return OnDemand(self.images, self.size) if large else self._in_memory()
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
        note_use(path)
        return stored

    def _write(self, path: Path, shape: tuple[int, ...]) -> None:
        """Write the rows in order to a temporary file and rename it: `path` is whole or missing."""
        part = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make_room(path, math.prod(shape), STORE_BYTES)
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for rows in self._rows():
                    file.write(rows.tobytes())
            os.replace(part, path)
        finally:
            if part is not None and os.path.exists(part):
                os.unlink(part)


def _opened(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return a store of this shape, memory-mapped; None without a whole file."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.dtype == np.uint8 and stored.shape == shape else None
