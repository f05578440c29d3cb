"""Sets given as Python objects: torch and torchvision data sets, Hugging Face data sets, pandas tables.

An object is opened if an entry of a configuration has its name (vismt/base/objects.py). A folder that Hugging Face's
`save_to_disk` wrote is opened as its object. hf/owner/name is opened as the data set of the hub, with its split after a colon.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vismt.base import console
from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.objects import object_named, title_of
from vismt.data.decode import decoding, to_rgb
from vismt.data.image_set import ImageSet
from vismt.storage.files import JsonObject, parse_json
from vismt.storage.paths import regular_file
from vismt.storage.wheels import one_line

HUB = "hf/"  # start of the name of a data set on the hub
# a file that `save_to_disk` writes -> a key in it
SAVED = {"dataset_dict.json": "splits", "state.json": "_data_files"}
_IMAGES = ("image", "img", "images", "pixel_values")
_LABELS = ("label", "labels", "class", "target", "fine_label", "category")


def python_object(card: str, split: str) -> Any:
    """Return the object that an entry of a configuration names, or that `save_to_disk` wrote. Return None for any other card.

    Code in a repository of the hub is never run.
    """
    given = object_named(card)
    hub = card.startswith(HUB)
    if given is None and (hub or _is_saved(Path(card))):
        load = _function("load_dataset" if hub else "load_from_disk", card)
        try:
            given = load(card.removeprefix(HUB))
        # builders may raise any error: no network, no access, unknown formats, several configurations
        except Exception as error:
            what = "the hub's" if hub else "the saved"
            raise UserError(f"data '{card}': {what} data set cannot be loaded: {one_line(str(error))}") from error
    if isinstance(given, Mapping):  # a DatasetDict
        require_known(f"data '{title_of(card)}': no split", [split], given)
        return given[split]
    return given


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder. A folder of class folders may also hold a file of such a name."""
    for name, key in SAVED.items():
        with suppress(OSError, ValueError, TypeError):  # the file is missing or has another format
            if key in parse_json(regular_file(folder / name).read_text(encoding="utf8")):
                return True
    return False


def _function(name: str, card: str) -> Any:
    try:
        # An import statement would find the folder datasets/ of a checkout, which lacks the name.
        return getattr(importlib.import_module("datasets"), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data '{card}': needs the package datasets, which is not installed: pip install datasets."
        ) from error


def images_of(given: Any, title: str, split: str) -> ImageSet:
    """Return a data set of (image, label) pairs, or of rows with an image and a label, as labelled images.

    An image is a Pillow image, or a Tensor (3, h, w) or (1, h, w), uint8 or floating point in [0, 1], which is rounded to
    1/255. A label is a whole number from 0. Class names come from the data set, or are the numbers. Its content is not known
    before every image is read, so `content` is the title.
    """
    _check_indexed(given, title, "(image, label)")
    image, label = _columns(given, title)
    labels = _labels(given, label, title)
    classes = _classes(given, label, max(labels) + 1)

    def read(i: int) -> Tensor:
        with decoding(f"{title}: example {i}", "Give images without normalisation, in [0, 1] or 0 to 255."):
            return _to_bytes(given[i][image])

    return ImageSet(
        name=title,
        split=split,
        classes=classes,
        labels=torch.tensor(labels, dtype=torch.int64),
        ids=[f"{i:06d}" for i in range(len(labels))],
        read=read,
        content=lambda: title,
        where=title,
        cached=False,
    )


def features_of(given: Any, title: str, split: str) -> tuple[ImageSet, Tensor] | None:
    """Return a data set of (feature vector, label) pairs as a set without images, and the vectors, float32 (n, d).

    Return None for a data set of anything else. Raise UserError for vectors of different lengths or with values that are not
    finite.
    """
    first = given[0] if isinstance(given, Dataset) and len(cast(Any, given)) else None
    if not isinstance(first, tuple) or len(first) != 2 or getattr(first[0], "ndim", 0) != 1:
        return None
    vectors = [torch.as_tensor(given[i][0]).float() for i in range(len(cast(Any, given)))]
    lengths = sorted({len(vector) for vector in vectors})
    if len(lengths) > 1:
        raise UserError(
            f"data '{title}': feature vectors of {lengths[0]} and of {lengths[-1]} numbers; give them one length."
        )
    values = torch.stack(vectors)
    if not bool(values.isfinite().all()):
        raise UserError(f"data '{title}': a feature is NaN or infinite; leave its example out.")
    labels = _labels(given, 1, title)
    images = ImageSet(
        name=title,
        split=split,
        classes=_classes(given, 1, max(labels) + 1),
        labels=torch.tensor(labels, dtype=torch.int64),
        ids=[f"{i:06d}" for i in range(len(labels))],
        read=values.__getitem__,
        content=lambda: title,
        where=title,
        cached=False,
    )
    return images, values


def texts_of(given: Any, title: str) -> tuple[list[JsonObject], str]:
    """Return the rows of a Hugging Face data set or a pandas table, and a digest of them."""
    _check_indexed(given, title, "rows")
    if hasattr(given, "to_dict") and hasattr(given, "iloc"):
        rows = given.to_dict("records")
    else:
        rows = [dict(given[i]) if isinstance(given[i], Mapping) else given[i] for i in range(len(given))]
    for number, row in enumerate(rows):
        names = list(row) if isinstance(row, dict) else [type(row)]
        if not all(isinstance(name, str) for name in names):
            raise UserError(
                f"data '{title}': row {number} has no fields named by text ({names}); give texts as columns."
            )
    return rows, hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _check_indexed(given: object, title: str, of: str) -> None:
    if not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise UserError(
            f"data '{title}': {type(given).__name__} has no length or no index; give a map-style data set of {of}."
        )
    if not len(given):
        raise UserError(f"data '{title}': the data set is empty.")


def _columns(given: object, title: str) -> tuple[str | int, str | int]:
    names = getattr(given, "column_names", None)
    if not isinstance(names, Sequence):
        return 0, 1
    image = next((name for name in _IMAGES if name in names), None)
    label = next((name for name in _LABELS if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"data '{title}': columns {', '.join(names)}; one must be called {' or '.join(_IMAGES)}, another "
            f"{' or '.join(_LABELS)}; rename them with rename_column."
        )
    return image, label


def _labels(given: Any, label: str | int, title: str) -> list[int]:
    """Return the label of every example, if possible without decoding the images."""
    if isinstance(label, str):
        values = list(given[label])
    else:
        stored = _stored_labels(given)
        if stored is None:
            values = [given[i][label] for i in console.track(range(len(given)), "data", f"{title}: reading labels")]
        else:
            values = stored
    tensors = [value for value in values if isinstance(value, Tensor)]
    others = [value for value in values if not isinstance(value, Tensor)]
    whole = all(value.numel() == 1 and not value.is_floating_point() for value in tensors)
    if not whole or not all(isinstance(value, (int, np.integer)) for value in others):
        raise UserError(
            f"data '{title}': label {shown_value(values[0])}; a label must be a whole number from 0 (encode texts first)."
        )
    labels = [int(value) for value in values]
    if min(labels) < 0:
        raise UserError(f"data '{title}': label {min(labels)}; labels are whole numbers from 0.")
    return labels


def _stored_labels(given: Any) -> list[Any] | None:
    """Return the labels that a data set has as a list, if nothing transforms them and about 16 examples agree."""
    # transforms of image and label: one function, or torchvision's pair of two
    both = getattr(given, "transforms", None)
    changes = getattr(given, "target_transform", None), getattr(both, "target_transform", both)
    if changes != (None, None):
        return None
    lists: list[Any] = [getattr(given, name, None) for name in ("targets", "labels", "_labels")]
    if isinstance(given, torch.utils.data.Subset):
        inner = _stored_labels(given.dataset)
        lists = [inner and [inner[i] for i in given.indices]]
    for values in lists:
        with suppress(TypeError, ValueError, RuntimeError):  # no list, or labels that are not numbers
            places = {*range(0, len(values), -(-len(values) // 16)), len(values) - 1}
            if len(values) == len(given) and all(int(values[i]) == int(given[i][1]) for i in places):
                return list(values)
    return None


def _classes(given: object, label: object, count: int) -> list[str]:
    names: Any = None
    if isinstance(label, str):
        names = getattr(getattr(given, "features", {}).get(label), "names", None)
    else:
        source = given
        while isinstance(source, torch.utils.data.Subset):
            source = source.dataset
        names = getattr(source, "classes", None)
    texts = [str(name) for name in names or ()]
    return texts if len(texts) >= count and len(set(texts)) == len(texts) else [str(i) for i in range(count)]


def _to_bytes(image: object) -> Tensor:
    """Return a Pillow image, an array (h, w, 3) or a Tensor as uint8 (3, h, w). Raise ValueError for anything else."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        return to_rgb(Image.fromarray(image))
    if not isinstance(image, Tensor):
        raise ValueError(f"it is {type(image).__name__}, no image of Pillow and no Tensor")
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"it has shape {tuple(image.shape)}, needed (3, h, w) or (1, h, w)")
    if image.is_floating_point():
        if not 0 <= float(image.min()) <= float(image.max()) <= 1:
            raise ValueError(f"it has values from {float(image.min()):.3g} to {float(image.max()):.3g}, needed [0, 1]")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"it is {image.dtype}, needed uint8 or floating point in [0, 1]")
    return image.expand(3, -1, -1).contiguous()
