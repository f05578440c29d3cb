"""Images of one size, decoded once into a uint8 store: a memory-mapped file in the cache folder, which later runs use.

The file is an npy array (n, 3, size, size), followed by a digest of each image and a digest of these digests. An image is
compared with its digest whenever it is read. A damaged store is written again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.identity import Identity, version
from vismt.base.seeds import digest
from vismt.data.image_set import named_groups
from vismt.data.images import ImageSet
from vismt.storage.cache import make_room, note_no_room, note_use
from vismt.storage.files import new_file
from vismt.storage.paths import cache_root, regular_file

RECIPE = "bilinear-antialias-shorter-side-centre-crop-2"
MEMORY_BYTES = 512 * 2**20
STORE_BYTES = 32 * 2**30  # bytes of all stores together
_CHUNK = 64
_DIGEST = 16  # bytes
FOR_TIMM = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}  # `square` in the words of timm
MAKERS = ("PIL", "numpy", "torch", "torchvision", "vismt.data")  # packages whose versions decide the pixels


def crop_square(image: Tensor, size: int) -> Tensor:
    """Return uint8 (3, size, size) of uint8 (3, h, w): the shorter side resized (bilinear, antialiased), then the centre.

    The longer side is rounded as torchvision and timm do.
    """
    if tuple(image.shape[-2:]) == (size, size):
        return image
    from torchvision.transforms.v2 import functional as vision

    return vision.center_crop(vision.resize(image, [size], antialias=True), [size, size])


class OnDemand:
    """Rows of a store that is too large to keep. Each row is decoded whenever it is read."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.stack([crop_square(self.images.read(int(i)), self.size).numpy() for i in index])


class Pixels:
    """A set of images as a uint8 store (n, 3, size, size), built once with a progress bar.

    `pixels[index]` is float32 (b, 3, size, size) in [0, 1] for an int64 index (b,).

    The store is a file in the cache folder. Its name depends on the content of the images, the size and the versions of what
    decodes them, and the next run uses it again. The folder takes up to 32 GiB, and the least recently used stores are deleted
    first. A set beyond that (ImageNet, QuickDraw) is not stored, and each image is decoded whenever it is drawn. If the folder
    cannot be written, one notice is given and the store is kept in memory. A store of more than 512 MiB is then decoded as it
    is drawn.

    `key` is a text that differs for any other pixels. It is None for a set too large to store. `group_of`, int64 (n,), is equal
    for images that are not independent, if the owner of the set has found them. cache: False keeps the store in memory, for any
    size. Raise UserError for a damaged image.
    """

    def __init__(self, images: ImageSet, size: int, *, cache: bool = True) -> None:
        if size < 1:
            raise UserError(f"data '{images.name}': image size {size} must be at least 1.")
        self.images, self.size = images, size
        self.name, self.split, self.classes = images.name, images.split, images.classes
        self.labels, self.ids = images.labels, images.ids
        self.group_of: Tensor | None = None
        needed = len(images) * 3 * size * size if cache else 0
        self.store: np.ndarray | OnDemand
        self._digests: bytes | None = None  # digests of the images of a store on disk
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

    def groups(self, index: Tensor) -> tuple[dict[str, str], str]:
        """Return the group of each image by its id, as `named_groups` does."""
        rows = index.tolist()
        return named_groups([self.ids[i] for i in rows], [(self.images, i) for i in rows])

    def raw(self, index: Tensor) -> Tensor:
        """Return the same images as stored: uint8 (b, 3, size, size)."""
        if index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
            raise TypeError(f"index must be whole numbers (b,), is {index.dtype} {tuple(index.shape)}")
        places = index.cpu().numpy()
        rows = self.store[places]
        if self._digests is not None:
            expected = [self._digests[_DIGEST * i : _DIGEST * (i + 1)] for i in (places % len(self)).tolist()]
            if any(xxhash.xxh3_128_digest(row) != one for row, one in zip(rows, expected)):
                console.stage("cache", f"{self._path.name} is damaged; its images are decoded again")
                with suppress(OSError):
                    self._path.unlink()
                self.store = self._on_disk()
                rows = self.store[places]
        return torch.from_numpy(rows)

    def _rows(self) -> Iterator[np.ndarray]:
        def row(i: int) -> np.ndarray:
            return crop_square(self.images.read(i), self.size).numpy()

        text = f"{self.name} ({self.split}) at {self.size} px"
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
            console.bar("data", text, len(self)) as bar,
        ):
            for start in range(0, len(self), _CHUNK):
                stop = min(start + _CHUNK, len(self))
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
        digests = self._digests if self._digests is not None else b"".join(map(xxhash.xxh3_128_digest, self.store))
        return str(Identity("pixels", self.size, digests))

    @property
    def content(self) -> str:
        """Digest of the images as they are in any copy, for any `size`. "" if that is not known without reading all images."""
        known = self.images.cached and not self.images.timed and len(self) * 3 * self.size**2 <= STORE_BYTES
        return digest(self.images.content().encode()) if known else ""

    @cached_property
    def _path(self) -> Path:
        made_by = [version(maker) for maker in MAKERS]
        identity = Identity(RECIPE, self.size, self.images.content(), "\n".join(self.ids), *made_by)
        return cache_root() / "pixels" / f"{self.name}-{self.split}-{self.size}-{identity}.npy"

    def _on_disk(self) -> np.ndarray | OnDemand:
        self._digests = None
        shape = (len(self), 3, self.size, self.size)
        found = _opened(self._path, shape)
        if found is None:
            try:
                self._write(shape)
            except OSError as error:
                large = math.prod(shape) > MEMORY_BYTES
                how = "decoded as they are drawn" if large else "kept in memory"
                reason = f"'{self._path}': {error.strerror or error}. Free space or set VISMT_CACHE."
                note_no_room(self._path.parent, f"decoded images are {how}", OSError(reason))
                return OnDemand(self.images, self.size) if large else self._in_memory()
            found = _opened(self._path, shape)
            if found is None:  # changed between the two
                return OnDemand(self.images, self.size)
        note_use(self._path)
        stored, self._digests = found
        return stored

    def _write(self, shape: tuple[int, ...]) -> None:
        """Write the rows in order with their digests. The file is whole and on the disk, or missing."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        make_room(self._path, math.prod(shape), STORE_BYTES)
        digests = bytearray()
        with new_file(self._path) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for rows in self._rows():
                file.write(rows.tobytes())
                digests += b"".join(map(xxhash.xxh3_128_digest, rows))
            file.write(digests + xxhash.xxh3_128_digest(bytes(digests)))


def _opened(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, bytes] | None:
    """Return a store of this shape, memory-mapped, and the digests of its images. Return None unless the file is whole."""
    try:
        stored = np.load(regular_file(path), mmap_mode="r", allow_pickle=False)
        if stored.dtype != np.uint8 or stored.shape != shape:
            return None
        with path.open("rb") as file:
            file.seek(stored.offset + stored.nbytes)
            digests, last = file.read(_DIGEST * shape[0]), file.read(_DIGEST + 1)
    except (OSError, ValueError, EOFError):
        return None
    return (stored, digests) if last == xxhash.xxh3_128_digest(digests) else None
