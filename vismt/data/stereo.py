"""Tiles of the stereo pair inside the scikit-image wheel: image, metric depth from the true disparity, normals, edges.

Every split has its own columns of the image and its maps are derived from these columns alone, so no pixel, depth or edge
of the test tiles is in a training tile or has had a part in one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vismt.data.cards import Card
from vismt.data.decode import DAMAGED, decode_file
from vismt.data.dense_sample import Sample
from vismt.data.derived import normals_from_depth
from vismt.data.source_types import StereoTilesSource
from vismt.data.sources import fix, verify_counts
from vismt.errors import UserError

TARGETS = ("edge", "depth", "normals")


def files(source: StereoTilesSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The image and the disparity, each a group of its own name."""
    paths = {name: base / "data" / name for name in (source.image, source.disparity)}
    return {name: [(name, path)] if path.is_file() else [] for name, path in paths.items()}


def read_pair(source: StereoTilesSource, base: Path) -> Sample:
    """`image` float32 (3, h, w) and `depth` float32 (h, w) in metres, 0 where the disparity is not finite."""
    path = base / "data" / source.disparity
    try:
        with np.load(path, allow_pickle=False) as held:
            disparity = held[held.files[0]].astype(np.float64)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read ({error}). Install scikit-image again.") from error
    image = decode_file(base / "data" / source.image).to(torch.float32) / 255
    if disparity.shape != tuple(image.shape[-2:]):
        raise UserError(f"{path}: the disparity is {disparity.shape}, its image is {tuple(image.shape[-2:])}.")
    known = np.isfinite(disparity)
    depth = source.camera["fx"] * source.baseline / (np.where(known, disparity, 0) + source.offset)
    return {"image": image, "depth": torch.from_numpy(np.where(known & (depth > 0), depth, 0).astype(np.float32))}


def tiles(source: StereoTilesSource, height: int, split: str) -> list[tuple[int, int]]:
    """(top, left) of every tile of a split, in the whole image, row by row."""
    (tall, wide), (rows, columns), (start, end) = source.tile, source.grid[split], source.columns[split]
    tops, lefts = np.linspace(0, height - tall, rows), np.linspace(start, end - wide, columns)
    return [(round(float(top)), round(float(left))) for top in tops for left in lefts]


def load(card: Card, source: StereoTilesSource, base: Path, split: str) -> tuple[list[str], Callable[[int], Sample]]:
    """Ids `<split>/<top>_<left>` and the reader of the tiles, without the edges, which follow from their depth.

    Only files inside the installed package are read; one that is not there is a UserError (never a download).
    """
    absent = next((name for name, entries in files(source, base).items() if not entries), None)
    if absent is not None:
        raise UserError(f"{card.shown}: the installed scikit-image has no '{absent}'. {fix(card)}")

    @functools.cache
    def whole() -> Sample:
        return read_pair(source, base)

    @functools.cache
    def part(name: str) -> Sample:
        """The columns of a split with their normals."""
        start, end = source.columns[name]
        image, depth = whole()["image"][..., start:end], whole()["depth"][..., start:end]
        camera = {**source.camera, "cx": source.camera["cx"] - start}
        return {"image": image, "depth": depth, "normals": normals_from_depth(depth, **camera)}

    tall, wide = source.tile
    height, width = whole()["image"].shape[-2:]
    spans = source.columns.values()
    if tall > height or any(end > width or end - start < wide for start, end in spans):
        raise UserError(
            f"{card.shown}: tiles of {source.tile} do not fit into the columns {list(spans)} of {height} x {width}."
        )
    names = list(source.splits) if split == "all" else [split]
    entries = [(name, top, left) for name in names for top, left in tiles(source, height, name)]
    verify_counts(card, source, base, {name: sum(entry[0] == name for entry in entries) for name in names}, {})

    def read(i: int) -> Sample:
        name, top, left = entries[i]
        left -= source.columns[name][0]
        return {key: m[..., top : top + tall, left : left + wide].contiguous() for key, m in part(name).items()}

    return [f"{name}/{top:03d}_{left:03d}" for name, top, left in entries], read
