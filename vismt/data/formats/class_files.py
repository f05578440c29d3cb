"""The images of one class of a converted Meta-Dataset domain: an HDF5 file, a TFRecord file, or a folder of image files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.copies import fix, shown_path
from vismt.data.decode import decode_bytes, decode_file, is_image_name
from vismt.data.formats import tfrecords
from vismt.data.source_types import Card


@dataclass(frozen=True)
class ClassImages:
    """Images by number. names: of each, relative to the folder of the set; paths: the files; read: uint8 (3, h, w)."""

    names: list[str]
    paths: list[Path]
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.names)


def open_class(card: Card, base: Path, folder: Path | None, label: int, expected: int | None) -> ClassImages | None:
    """Return the images of a class from `<label>.h5`, `<label>.tfrecords` or `folder`; None where there are none.

    expected: number of images of a file, None when unknown; a folder may hold any.

    Raises:
        UserError: a file that cannot be read, or with another number of images.
    """
    for suffix, opened in FORMS.items():
        path = base / f"{label}{suffix}"
        if path.is_file():
            images = opened(card, path, label)
            if len(images) != (expected or max(len(images), 1)):
                raise UserError(f"{shown_path(path)}: holds {len(images):,} of {expected or 1:,} images. {fix(card)}")
            return images
    paths = [] if folder is None else [path for path in sorted(folder.iterdir()) if is_image_name(path.name)]
    names = [path.relative_to(base).as_posix() for path in paths]
    return ClassImages(names, paths, lambda i: decode_file(paths[i])) if paths else None


def _h5_images(card: Card, path: Path, label: int) -> ClassImages:
    h5py = _h5py(card)
    try:
        with h5py.File(path) as file:
            count = len(file)
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read as HDF5: {error}. {fix(card)}") from error
    return ClassImages([f"{path.name}/{i}" for i in range(count)], [path], lambda i: _read_h5(card, path, str(i)))


def _record_images(card: Card, path: Path, label: int) -> ClassImages:
    positions = tfrecords.scan(path)
    names = [f"{path.name}/{i}" for i in range(len(positions))]
    return ClassImages(names, [path], lambda i: _read_record(path, positions[i], i, label))


FORMS = {".h5": _h5_images, ".tfrecords": _record_images}


def _read_record(path: Path, position: int, number: int, label: int) -> Tensor:
    """Return the image of a record, whose label must be that of its file."""
    features = tfrecords.read_example(path, position, number)
    shown = f"{shown_path(path)}: record {number}"
    for name, kind in (("image", bytes), ("label", int)):
        values = features.get(name, [])
        if len(values) != 1 or not isinstance(values[0], kind):
            held = ", ".join(f"'{key}'" for key in features) or "nothing"
            raise UserError(f"{shown}: needs one '{name}' of type {kind.__name__}; its features are {held}.")
    if features["label"] != [label]:
        raise UserError(
            f"{shown}: has label {features['label'][0]!r}, its file is that of class {label}. Convert it again."
        )
    return decode_bytes(bytes(features["image"][0]), shown)


def _h5py(card: Card) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f'{card.shown}: needs h5py, which is not installed: pip install "vismt[metadataset]".'
        ) from error
    return h5py


def _read_h5(card: Card, path: Path, key: str) -> Tensor:
    # Opened for each image: an open file cannot be shared with the processes of a loader, and there may be hundreds.
    shown = f"{shown_path(path)}: image '{key}'"
    try:
        with _h5py(card).File(path) as file:
            image = torch.from_numpy(file[key]["image"][()])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{shown} cannot be read ({error}). Replace the file, or set on_bad_sample=skip.") from error
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{shown} is {image.dtype} {tuple(image.shape)}, must be uint8 (h, w, 3).")
    return image.permute(2, 0, 1).contiguous()
