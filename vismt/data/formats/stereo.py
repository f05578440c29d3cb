"""Tiles of the stereo pair inside the scikit-image wheel: image, metric depth from the true disparity, normals, edges.

Every split has its own columns of the image, and its maps are derived from these columns alone. No pixel, depth or edge of the
test tiles is therefore in a training tile or was used for one.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from vismt.base.errors import UserError
from vismt.config.typed import RelativePath
from vismt.data.copies import digest_files, fix, shown_path, verify_counts
from vismt.data.decode import decode_file, decoding, read_image_bytes
from vismt.data.maps.dense_sample import Sample
from vismt.data.maps.dense_set import DenseSet, DenseSource, check_camera
from vismt.data.maps.derived_maps import normals_from_depth
from vismt.data.source_types import Card, Files, PackagedSource, file_groups, source_kind

_TARGETS = ("edge", "depth", "normals")


@source_kind("stereo_tiles")
@dataclass(frozen=True, kw_only=True)
class StereoTilesSource(PackagedSource, DenseSource):
    """Tiles of the left image of a rectified stereo pair that scikit-image ships, with maps from its true disparity.

    depth = fx * baseline / (disparity + offset). Normals and edges are derived from the depth.

    Attributes:
        image: File of the left image.
        disparity: File (npz) of the disparity in pixels, not finite if unknown.
        camera: Values fx, fy, cx, cy in pixels.
        baseline: Distance of the cameras in metres.
        offset: Offset of the disparity in pixels.
        tile: Height and width of a tile in pixels.
        columns: Columns [from, to) that each split may see.
        grid: Numbers of rows and columns of tiles of each split, which are spread evenly.
    """

    image: RelativePath
    disparity: RelativePath
    camera: dict[str, float]
    baseline: float
    offset: float
    tile: list[int]
    columns: dict[str, list[int]]
    grid: dict[str, list[int]]
    package: ClassVar[str | None] = "skimage"

    def check(self, where: str) -> None:
        super().check(where)
        check_camera(self.camera, where)
        pairs = [self.tile, *self.columns.values(), *self.grid.values()]
        splits = set(self.splits)
        if any(len(pair) != 2 or min(pair) < 0 for pair in pairs) or not splits == set(self.columns) == set(self.grid):
            raise UserError(
                f"{where}: 'tile' must be two counts, 'columns' and 'grid' two for each of {sorted(splits)}."
            )
        spans = sorted(self.columns.values())
        if any(left[1] > right[0] for left, right in pairwise(spans)):
            raise UserError(f"{where}: the columns {self.columns} of the splits must not overlap.")

    def list_files(self, base: Path) -> Files:
        return file_groups(base / "data", (self.image, self.disparity))

    def load(self, card: Card, base: Path, split: str) -> DenseSet:
        """Return the tiles of `split`. Ids are `<split>/<top>_<left>`."""
        absent = next((name for name, entries in self.list_files(base).items() if not entries), None)
        if absent is not None:
            raise UserError(f"{card.shown}: the installed scikit-image has no '{absent}'. {fix(card)}")

        @functools.cache
        def content() -> str:
            files = {name: base / "data" / name for name in (self.image, self.disparity)}
            about = (self.camera, self.baseline, self.offset, self.tile, self.columns, self.grid)
            return f"{digest_files(files.items()).sha256}:{about}"

        @functools.cache
        def pair() -> Sample:
            return read_pair(self, base)

        @functools.cache
        def columns_of(name: str) -> Sample:
            start, end = self.columns[name]
            image, depth = pair()["image"][..., start:end], pair()["depth"][..., start:end]
            camera = {**self.camera, "cx": self.camera["cx"] - start}
            return {"image": image, "depth": depth, "normals": normals_from_depth(depth, camera)}

        tall, wide = self.tile
        height, width = pair()["image"].shape[-2:]
        spans = self.columns.values()
        if tall > height or any(end > width or end - start < wide for start, end in spans):
            raise UserError(
                f"{card.shown}: tiles of {self.tile} do not fit into the columns {list(spans)} of {height} x {width}."
            )
        entries = [(name, top, left) for name in self.wanted(split) for top, left in tiles(self, height, name)]
        names = [name for name, _, _ in entries]
        verify_counts(card, self, base, {name: names.count(name) for name in self.wanted(split)})

        def stored(i: int) -> Sample:
            name, top, left = entries[i]
            left -= self.columns[name][0]
            maps = columns_of(name).items()
            return {key: values[..., top : top + tall, left : left + wide].contiguous() for key, values in maps}

        ids = [f"{name}/{top:03d}_{left:03d}" for name, top, left in entries]
        where = shown_path(base)
        return DenseSet(
            card.name, split, [], list(_TARGETS), ids, stored, lambda i: content(), where=where, edges="depth"
        )


def read_pair(source: StereoTilesSource, base: Path) -> Sample:
    """Return `image` float32 (3, h, w) and `depth` float32 (h, w) in metres, 0 if the disparity is not finite."""
    path = base / "data" / source.disparity
    with (
        decoding(str(path), "Install scikit-image again."),
        np.load(io.BytesIO(read_image_bytes(path)), allow_pickle=False) as archive,
    ):
        disparity = archive[archive.files[0]].astype(np.float64)
    image = decode_file(base / "data" / source.image).to(torch.float32) / 255
    if disparity.shape != tuple(image.shape[-2:]):
        raise UserError(f"{path}: the disparity is {disparity.shape}, its image is {tuple(image.shape[-2:])}.")
    valid = np.isfinite(disparity)
    depth = source.camera["fx"] * source.baseline / (np.where(valid, disparity, 0) + source.offset)
    return {"image": image, "depth": torch.from_numpy(np.where(valid & (depth > 0), depth, 0).astype(np.float32))}


def tiles(source: StereoTilesSource, height: int, split: str) -> list[tuple[int, int]]:
    """Return (top, left) of every tile of a split, in the whole image, row by row."""
    (tall, wide), (rows, columns), (start, end) = source.tile, source.grid[split], source.columns[split]
    tops, lefts = np.linspace(0, height - tall, rows), np.linspace(start, end - wide, columns)
    return [(round(float(top)), round(float(left))) for top in tops for left in lefts]
