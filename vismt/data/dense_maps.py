"""What the files of a dense set hold, and how each becomes a target of the dense sample.

    label          class index, `first` is class 0 and `void` no class: 8-bit image or npy of whole numbers
    depth_mm       16-bit image of millimetres, 0 = none
    depth_512      16-bit image of 1/512 m, 65535 = none (Taskonomy)
    depth_m        npy of metres
    inverse_depth  npy of disparities or other multiples of 1/depth, kept as they are
    normal         8-bit RGB image of (n + 1) * 127 + 1, 0 = none
    normal_255     8-bit RGB image of (n + 1) * 127.5
    edge           image, edge where above `edge_above` of the largest value its type holds; npy, where above `edge_above`
    saliency       the same with 1/2
    pascal_parts, pascal_context    MATLAB files, see pascal_context.py

An npy file of normals holds the vectors (h, w, 3) themselves, whatever the name. No depth: zero, negative or not finite. No
normal: a vector far from unit length, which is what (0, 0, 0), white and the middle grey of an 8-bit image decode to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vismt.data.decode import DAMAGED, decode_file
from vismt.data.dense_sample import IGNORE, Sample
from vismt.data.pascal_context import read_context, read_parts
from vismt.data.source_types import DENSE_MAPS, DenseSource
from vismt.errors import UserError

UNIT_LENGTH = (0.5, 1.5)  # what an 8-bit or interpolated unit vector may have become


def read_array(path: Path) -> np.ndarray:
    """The raw values of an image or npy file without any colour conversion; UserError naming the file when it is damaged."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            return np.array(image)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be decoded ({error}). Replace the file.") from error


def _plane(path: Path, what: str, kinds: str) -> np.ndarray:
    """(h, w) values whose dtype is one of `kinds`; an axis of length 1 before or after is dropped."""
    values = read_array(path)
    shape = values.shape
    if values.ndim == 3 and 1 in (shape[0], shape[2]):
        values = values[..., 0] if shape[2] == 1 else values[0]
    if values.ndim != 2 or values.dtype.kind not in kinds:
        raise UserError(f"{path}: {what}, is {values.dtype} {shape}.")
    return values


def read_image(path: Path) -> Sample:
    """`image` float32 (3, h, w) in [0, 1], from an image file or an npy (h, w, 3) of bytes or of values in [0, 1]."""
    if path.suffix.lower() != ".npy":
        return {"image": decode_file(path).to(torch.float32) / 255}
    values = read_array(path)
    if values.ndim != 3 or values.shape[2] != 3 or not (values.dtype == np.uint8 or values.dtype.kind == "f"):
        raise UserError(f"{path}: an image must be (h, w, 3) of bytes or floats, is {values.dtype} {values.shape}.")
    scaled = values / 255 if values.dtype == np.uint8 else values
    if not (scaled.min(initial=0) >= -1e-3 and scaled.max(initial=0) <= 1 + 1e-3):
        raise UserError(f"{path}: the values of an image must lie in [0, 1], are {scaled.min():g} to {scaled.max():g}.")
    return {"image": torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1).contiguous().clamp_(0, 1)}


def read_label(path: Path, classes: int, void: int | None, first: int = 0) -> Sample:
    """`semseg` from class indices first..first + classes - 1; `void` becomes 255."""
    if path.suffix.lower() == ".npy":
        values = _plane(path, "a label map must be one channel of numbers", "iuf")
    else:
        values = _plane(path, "a label map must be one 8-bit channel", "u")
        if values.dtype != np.uint8:
            raise UserError(f"{path}: a label map must be one 8-bit channel, is {values.dtype} {values.shape}.")
    strange = [
        v for v in np.unique(values) if v != void and not (first <= v < first + classes and v == round(float(v)))
    ]
    if strange:
        start = f", the first is {first}" if first else ""
        raise UserError(f"{path}: label {strange[0]:g} found, but there are {classes} classes (void {void}{start}).")
    whole = values.astype(np.int64)
    return {
        "semseg": torch.from_numpy(
            np.where(whole == void, IGNORE, whole - first) if void is not None else whole - first
        )
    }


def read_depth(name: str, path: Path) -> Sample:
    """`depth` of one of the forms depth_mm, depth_512, depth_m, inverse_depth."""
    if name in ("depth_m", "inverse_depth"):
        if path.suffix.lower() != ".npy":
            raise UserError(f"{path}: {name} is read from .npy files; an image of millimetres is depth_mm.")
        metres = _plane(path, "a depth map must be one channel of floats", "f").astype(np.float32)
    else:
        raw = _plane(path, "a depth map must be one channel of whole numbers", "ui").astype(np.int64)
        raw = np.where(raw == 65535, 0, raw) if name == "depth_512" else raw
        metres = (raw / (512 if name == "depth_512" else 1000)).astype(np.float32)
    return {"depth": torch.from_numpy(np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0)))}


def read_normal(name: str, path: Path, axes: list[int]) -> Sample:
    """`normals`, the stored components times `axes`."""
    values = read_array(path)
    bytes_ = path.suffix.lower() != ".npy"
    if values.ndim != 3 or values.shape[2] != 3 or (values.dtype != np.uint8 if bytes_ else values.dtype.kind != "f"):
        must = "8-bit RGB" if bytes_ else "(h, w, 3) of floats"
        raise UserError(f"{path}: a normal map must be {must}, is {values.dtype} {values.shape}.")
    vectors = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    if bytes_:
        vectors = (vectors - 1) / 127 - 1 if name == "normal" else vectors / 127.5 - 1
    vectors = vectors * torch.tensor(axes, dtype=torch.float32)[:, None, None]
    length = vectors.norm(dim=0)
    good = (length > UNIT_LENGTH[0]) & (length < UNIT_LENGTH[1])
    return {"normals": torch.where(good, vectors / length, 0.0)}


def read_binary(target: str, path: Path, above: float) -> Sample:
    """`edge` or `saliency`: 1 where the value is above `above` of the largest that the file's type holds (1 for floats)."""
    values = _plane(path, f"{'an' if target == 'edge' else 'a'} {target} map must be one channel", "buif")
    top = np.iinfo(values.dtype).max if values.dtype.kind in "ui" and path.suffix.lower() != ".npy" else 1
    top = 65535 if values.dtype == np.int32 and top > 1 else top  # Pillow opens some 16-bit images as 32-bit
    return {target: torch.from_numpy((values > above * top).astype(np.int64))}


def read_maps(paths: dict[str, Path], source: DenseSource, classes: int, known_normals: dict[str, int]) -> Sample:
    """The sample of one image and those of its maps that are there, before anything is derived.

    Raises UserError naming the file for a damaged one, values that the map cannot hold, and a map of another size.
    """
    sample = read_image(paths["image"])
    size, where = sample["image"].shape[-2:], None
    for name, path in paths.items():
        target = DENSE_MAPS.get(name)
        if name == "label":
            found = read_label(path, classes, source.void, source.first)
        elif name == "pascal_parts":
            found = read_parts(path)
        elif name == "pascal_context":
            found, where = read_context(path, known_normals)
        elif target == "depth":
            found = read_depth(name, path)
        elif target == "normals":
            found = read_normal(name, path, source.axes)
        elif target is not None:
            found = read_binary(target, path, source.edge_above if target == "edge" else 0.5)
        else:
            continue
        for values in found.values():
            if values.shape[-2:] != size:
                raise UserError(
                    f"{path}: the map is {tuple(values.shape[-2:])}, its image is {tuple(size)}. No map is resized on reading: "
                    "bring the file to the size of its image, by nearest neighbour."
                )
        sample |= found
    if where is not None and "normals" in sample:
        sample["normals"] = sample["normals"] * where
    return sample
