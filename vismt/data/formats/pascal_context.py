"""The .mat files of PASCAL-Context and PASCAL-Part in the layout of ASTMT (Maninis et al., arXiv 1904.08918).

pascal-context/trainval/<id>.mat   `LabelMap` (h, w), one of 459 classes a pixel: its borders are the edges. ASTMT takes the
                                   Laplacian of the map and thins it; here a border is the pixel left of or above the change,
                                   thinned, too.
human_parts/<id>.mat               `anno`: objects, each with class (15 = person), mask, and parts with name and mask. The 24
                                   parts of a person become the 6 below, 0 elsewhere. A sample without a person with parts
                                   lacks the target, as ASTMT ignores it.
normals_distill/<id>.png           normals predicted by a network trained on NYUv2: they count only on the Context classes that
                                   NYUv2 knows, which the card's `normal_classes` maps from name to number.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from vismt.base.errors import UserError
from vismt.data.decode import decoding, read_image_bytes
from vismt.data.maps.dense_sample import IGNORE, Sample
from vismt.data.maps.derived_maps import edges_from_labels

PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PERSON = 15
NORMALS_COUNT = "normals count"  # bool (h, w), only while a sample is read: the pixels whose normals count
_HEAD = "hair head lear lebrow leye mouth nose rear rebrow reye"
_LIMBS = {3: "luarm ruarm", 4: "lhand llarm rhand rlarm", 5: "luleg ruleg", 6: "lfoot llleg rfoot rlleg"}
_OF_SIX = {1: _HEAD, 2: "neck torso", **_LIMBS}
PART_OF = {name: number for number, names in _OF_SIX.items() for name in names.split()}


def load_mat(path: Path, key: str) -> np.ndarray:
    """Return the variable `key` of a MATLAB file. Raise UserError if the file cannot be read or lacks it."""
    from scipy.io import loadmat

    with decoding(str(path), "Replace the file."):
        variables = loadmat(io.BytesIO(read_image_bytes(path)))
    if key not in variables:
        names = sorted(name for name in variables if not name.startswith("__"))
        raise UserError(f"{path}: has no variable '{key}', holds {names}.")
    return variables[key]


def read_context(path: Path, normal_classes: dict[str, int]) -> Sample:
    """Return `edge` and, unless `normal_classes` is empty, NORMALS_COUNT."""
    labels = torch.from_numpy(np.asarray(load_mat(path, "LabelMap")).astype(np.int64))
    if labels.ndim != 2:
        raise UserError(f"{path}: LabelMap must be (h, w), is {tuple(labels.shape)}.")
    # 255 is a class of PASCAL-Context ("money") and not a missing label. The shift avoids that number.
    sample = {"edge": edges_from_labels(labels + IGNORE + 1)}
    if normal_classes:
        sample[NORMALS_COUNT] = torch.isin(labels, torch.tensor(sorted(normal_classes.values())))
    return sample


def read_parts(path: Path) -> Sample:
    """Return `parts`, int64 (h, w) of 0..6 (PARTS). Return an empty dictionary if no person has parts."""
    annotation = load_mat(path, "anno")
    parts: np.ndarray | None = None
    try:
        objects = annotation[0, 0][1].reshape(-1)
        for person in (item for item in objects if int(item[1].item()) == PERSON and item[3].size):
            if parts is None:
                parts = np.zeros(person[2].shape, dtype=np.int64)
            for part in person[3].reshape(-1):
                parts[np.asarray(part[1], dtype=bool)] = PART_OF[str(part[0].item())]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an annotation of PASCAL-Part ({type(error).__name__}: {error}).") from error
    return {} if parts is None else {"parts": torch.from_numpy(parts)}
