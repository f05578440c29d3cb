"""Forms of map files, and how each becomes a target of the dense sample.

    label class index, `first` is class 0 and `void` is unlabelled: 8-bit image or npy of whole numbers
    depth_mm       16-bit image of millimetres, 0 = none (8 bits, up to 255 mm, cannot hold the depth of a scene)
    depth_512      16-bit image of 1/512 m, 65535 = none (Taskonomy)
    depth_m        npy of metres
    inverse_depth  npy of disparities or other multiples of 1/depth, unchanged
    normal         8-bit RGB image of (n + 1) * 127 + 1, 0 = none
    normal_255     8-bit RGB image of (n + 1) * 127.5
    edge           image, edge where above `edge_above` of the largest value its type holds; npy, where above `edge_above`
    saliency       the same with 1/2
    pascal_parts, pascal_context    MATLAB files, see pascal_context.py

An npy file of normals holds the vectors (h, w, 3), whatever its name. Depth is missing if it is zero, negative or not finite. A
normal is missing if the vector is far from unit length, as for (0, 0, 0), white and the middle grey of an 8-bit image.

Maps belong to the stored pixels of their image, as the loaders of published sets pair them: the EXIF orientation of an image
turns its maps, too. A map with an orientation of its own, or of the size that the image has after turning, is not turned again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps

from vismt.base.errors import UserError
from vismt.data.decode import decoding, is_image_name, open_image, orientation_of, read_image_bytes, to_rgb
from vismt.data.formats.pascal_context import NORMALS_COUNT, read_context, read_parts
from vismt.data.maps.dense_sample import IGNORE, Sample
from vismt.data.maps.dense_transforms import turn, turned_vectors
from vismt.data.maps.derived_maps import normals_from_depth

UNIT_LENGTH = (0.5, 1.5)  # lengths that an 8-bit or interpolated unit vector may have


@dataclass(frozen=True)
class MapSettings:
    """What a card says about the values of its map files, see `DenseFilesSource`.

    classes: Number of classes of label maps. normal_classes: PASCAL-Context classes on which distilled normals count, name ->
    number. Empty for all classes. camera: Camera in stored pixels. Empty to derive no normals.
    """

    classes: int
    void: int | None = None
    first: int = 0
    edge_above: float = 0.5
    axes: list[int] = field(default_factory=lambda: [1, 1, 1])
    normal_classes: dict[str, int] = field(default_factory=dict)
    camera: dict[str, float] = field(default_factory=dict)


def read_array(path: Path) -> np.ndarray:
    """Return the raw values of an image or npy file without colour conversion. Raise UserError for a damaged file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[np.ndarray, int]:
    """Return the raw values of a file, turned by its own EXIF orientation, and that orientation (1 for none)."""
    data = read_image_bytes(path)
    if path.suffix.lower() == ".npy":
        with decoding(str(path), "Replace the file."):
            return np.load(io.BytesIO(data), allow_pickle=False), 1
    with open_image(data, str(path), "Replace the file.") as image:
        orientation = orientation_of(image)
        return np.array(image if orientation == 1 else ImageOps.exif_transpose(image)), orientation


def _plane(path: Path, what: str, kinds: str) -> np.ndarray:
    """Return (h, w) values of a dtype in `kinds`. An axis of length 1 before or after is dropped. `what` starts the error."""
    values = read_array(path)
    shape = values.shape
    if values.ndim == 3 and 1 in (shape[0], shape[2]):
        values = values[..., 0] if shape[2] == 1 else values[0]
    if values.ndim != 2 or values.dtype.kind not in kinds:
        raise UserError(f"{path}: {what}, is {values.dtype} {shape}. Convert the file.")
    return values


def read_image(path: Path) -> tuple[Sample, int]:
    """Return `image`, float32 (3, h, w) in [0, 1], of an image file or an npy (h, w, 3) of bytes or of values in [0, 1].

    The second value is the EXIF orientation by which the image was turned (1 for none).
    """
    if path.suffix.lower() != ".npy":
        with open_image(read_image_bytes(path), str(path)) as image:
            orientation = orientation_of(image)
            return {"image": to_rgb(image).to(torch.float32) / 255}, orientation
    values = read_array(path)
    if values.ndim != 3 or values.shape[2] != 3 or not (values.dtype == np.uint8 or values.dtype.kind == "f"):
        raise UserError(f"{path}: an image must be (h, w, 3) of bytes or floats, is {values.dtype} {values.shape}.")
    scaled = values / 255 if values.dtype == np.uint8 else values
    if not (scaled.min(initial=0) >= -1e-3 and scaled.max(initial=0) <= 1 + 1e-3):
        raise UserError(f"{path}: the values of an image must lie in [0, 1], are {scaled.min():g} to {scaled.max():g}.")
    return {"image": torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1).contiguous().clamp_(0, 1)}, 1


def read_label(name: str, path: Path, settings: MapSettings) -> Sample:
    """Return `semseg`: label `first` becomes class 0, `void` 255."""
    classes, first, void = settings.classes, settings.first, settings.void
    if path.suffix.lower() == ".npy":
        values = _plane(path, "a label map must be one channel of numbers", "iuf")
    else:
        what = "a label map must be one 8-bit channel of class numbers, grey or palette and not colours"
        values = _plane(path, what, "ub")
        if values.dtype.itemsize > 1:
            raise UserError(f"{path}: {what}, is {values.dtype} {values.shape}. Convert the file.")
    classes_and_void = {*range(first, first + classes), void}
    unknown = [value for value in np.unique(values).tolist() if value not in classes_and_void]
    if unknown:
        start = f", the first is {first}" if first else ""
        raise UserError(
            f"{path}: label {unknown[0]:g} found, but there are {classes} classes (void {void}{start}). "
            "Labels are whole numbers: correct the file, or `classes`, `first` and `void` of the card."
        )
    labels = torch.from_numpy(values.astype(np.int64))
    classes_from_0 = labels - first
    return {"semseg": classes_from_0 if void is None else classes_from_0.masked_fill(labels == void, IGNORE)}


def read_depth(name: str, path: Path, settings: MapSettings) -> Sample:
    """Return `depth` of a file in one of the forms depth_mm, depth_512, depth_m, inverse_depth."""
    if name in ("depth_m", "inverse_depth"):
        if path.suffix.lower() != ".npy":
            raise UserError(
                f"{path}: {name} is read from .npy files; an image of millimetres is depth_mm: name the folder so."
            )
        metres = _plane(path, "a depth map must be one channel of floats", "f").astype(np.float32)
    else:
        what = f"a depth map in {name} must be one channel of whole numbers of 16 bits or more"
        raw = _plane(path, what, "ui")
        if raw.dtype.itemsize < 2:
            raise UserError(
                f"{path}: {what}, is {raw.dtype} {raw.shape}; convert the set's 8-bit depth by its own scale."
            )
        raw = raw.astype(np.int64)
        if name == "depth_512":
            metres = (np.where(raw == 65535, 0, raw) / 512).astype(np.float32)
        else:
            metres = (raw / 1000).astype(np.float32)
    return {"depth": torch.from_numpy(np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0)))}


def read_normal(name: str, path: Path, settings: MapSettings) -> Sample:
    """Return `normals`, the stored components times `axes`."""
    values, orientation = _read(path)
    is_image = path.suffix.lower() != ".npy"
    fits = values.dtype == np.uint8 if is_image else values.dtype.kind == "f"
    if values.ndim != 3 or values.shape[2] != 3 or not fits:
        wanted = "8-bit RGB" if is_image else "(h, w, 3) of floats"
        raise UserError(f"{path}: a normal map must be {wanted}, is {values.dtype} {values.shape}.")
    vectors = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    if is_image:
        vectors = (vectors - 1) / 127 - 1 if name == "normal" else vectors / 127.5 - 1
    vectors = vectors * torch.tensor(settings.axes, dtype=torch.float32)[:, None, None]
    if orientation != 1:
        vectors = turned_vectors(vectors, orientation)
    length = vectors.norm(dim=0)
    good = (length > UNIT_LENGTH[0]) & (length < UNIT_LENGTH[1])
    return {"normals": torch.where(good, vectors / length, 0.0)}


def read_binary(name: str, path: Path, settings: MapSettings) -> Sample:
    """Return `edge` or `saliency`: 1 above a share of the largest value of the file's type (1 for floats)."""
    above, article = (settings.edge_above, "an") if name == "edge" else (0.5, "a")
    values = _plane(path, f"{article} {name} map must be one channel", "buif")
    largest = 1
    whole = values.dtype.kind != "f" and path.suffix.lower() != ".npy"
    if whole and above >= 1:
        raise UserError(f"{path}: edge_above {above:g} is a share of the largest value of an image; give one below 1.")
    if whole and values.dtype != bool:
        # Pillow opens some 16-bit images as 32-bit.
        largest = 65535 if values.dtype == np.int32 else np.iinfo(values.dtype).max
    return {name: torch.from_numpy((values > above * largest).astype(np.int64))}


class MapForm(NamedTuple):
    """The content of the files of a map: the target that they become, and their reader, which gets the name of the form."""

    target: str
    read: Callable[[str, Path, MapSettings], Sample]


MAP_FORMS = {
    "label": MapForm("semseg", read_label),
    "depth_mm": MapForm("depth", read_depth),
    "depth_m": MapForm("depth", read_depth),
    "depth_512": MapForm("depth", read_depth),
    "inverse_depth": MapForm("depth", read_depth),
    "normal": MapForm("normals", read_normal),
    "normal_255": MapForm("normals", read_normal),
    "edge": MapForm("edge", read_binary),
    "saliency": MapForm("saliency", read_binary),
    "pascal_parts": MapForm("parts", lambda name, path, settings: read_parts(path)),
    "pascal_context": MapForm("edge", lambda name, path, settings: read_context(path, settings.normal_classes)),
}


def read_maps(paths: dict[str, Path], settings: MapSettings) -> Sample:
    """Return the sample of one image and of its existing maps, before edges are derived.

    paths: File of the "image", and of each map by its name in MAP_FORMS. Errors name the file.
    """
    sample, orientation = read_image(paths["image"])
    size = sample["image"].shape[-2:]
    stored = size[::-1] if orientation > 4 else size
    for name, path in paths.items():
        if name == "image":
            continue
        maps = MAP_FORMS[name].read(name, path, settings)
        if settings.camera and "depth" in maps:
            maps["normals"] = normals_from_depth(maps["depth"], settings.camera)
        for values in maps.values():
            if values.shape[-2:] not in (size, stored):
                raise UserError(
                    f"{path}: the map is {tuple(values.shape[-2:])}, its image is {tuple(size)}. No map is resized on reading: "
                    "bring the file to the size of its image, by nearest neighbour."
                )
        if orientation != 1 and all(values.shape[-2:] == stored for values in maps.values()):
            turned = is_image_name(path.name) and _read(path)[1] != 1
            maps = maps if turned else turn(maps, orientation)
        sample |= maps
    where = sample.pop(NORMALS_COUNT, None)
    if where is not None and "normals" in sample:
        sample["normals"] = sample["normals"] * where
    return sample
