"""Images with per-pixel maps: class labels, metric depth and surface normals, each with what counts as 'no value'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismt.data.cards import Card, load_card
from vismt.data.decode import DAMAGED, decode_file, is_image_name
from vismt.data.kinds import DenseSource
from vismt.data.sources import fix, not_found, place, shown_path, verify_counts
from vismt.errors import UserError, near


@dataclass(frozen=True)
class DenseSet:
    """Split of a dense set. `maps` are the card's map names, `void` the label of pixels without a class.

    `read(i)` gives a dict of tensors of one size (h, w): `image` uint8 (3, h, w); `label` uint8 (h, w);
    `depth` float32 (1, h, w) in metres with `depth_mask` bool (1, h, w); `normal` float32 (3, h, w), unit length,
    0 where `normal_mask` bool (1, h, w) is False.
    """

    name: str
    split: str
    classes: list[str]
    void: int | None
    maps: list[str]
    ids: list[str]
    read: Callable[[int], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.ids)


def read_array(path: Path) -> np.ndarray:
    """The raw values of an image file without any colour conversion; UserError naming the file when it is damaged."""
    try:
        with Image.open(path) as image:
            return np.array(image)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be decoded ({error}). Replace the file.") from error


def read_label(path: Path, classes: int, void: int | None) -> dict[str, Tensor]:
    """`label` uint8 (h, w) with values below `classes`, or `void`."""
    values = read_array(path)
    if values.dtype != np.uint8 or values.ndim != 2:
        raise UserError(f"{path}: a label map must be one 8-bit channel, is {values.dtype} {values.shape}.")
    strange = [int(v) for v in np.unique(values) if v >= classes and v != void]
    if strange:
        raise UserError(f"{path}: label {strange[0]} found, but there are {classes} classes (void {void}).")
    return {"label": torch.from_numpy(values)}


def read_depth_mm(path: Path) -> dict[str, Tensor]:
    """`depth` float32 (1, h, w) in metres from millimetres, `depth_mask` False where the file holds 0."""
    values = read_array(path)
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise UserError(f"{path}: a depth map must be one channel of whole millimetres, is {values.dtype} {values.shape}.")
    millimetres = torch.from_numpy(values.astype(np.int32))[None]
    return {"depth": millimetres.to(torch.float32) / 1000, "depth_mask": millimetres > 0}


def read_normal(path: Path) -> dict[str, Tensor]:
    """`normal` float32 (3, h, w), n = (value - 1) / 127 - 1 scaled to unit length; `normal_mask` False where all are 0."""
    values = read_array(path)
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
        raise UserError(f"{path}: a normal map must be 8-bit RGB, is {values.dtype} {values.shape}.")
    raw = torch.from_numpy(values).permute(2, 0, 1).to(torch.float32)
    mask = (raw > 0).any(dim=0, keepdim=True)
    normal = torch.nn.functional.normalize((raw - 1) / 127 - 1, dim=0)
    return {"normal": torch.where(mask, normal, torch.zeros_like(normal)), "normal_mask": mask}


MAP_KINDS = ("label", "depth_mm", "normal")


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if is_image_name(path)} if folder.is_dir() else {}


def _folders(source: DenseSource, split: str) -> dict[str, str]:
    return {"image": source.image.format(split=split), **{k: p.format(split=split) for k, p in source.maps.items()}}


def files(source: DenseSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """Every image and map file, one group a folder (`train/label`), for the manifest."""
    groups = [folder for split in source.splits for folder in _folders(source, split).values()]
    return {group: [(f"{group}/{path.name}", path) for path in _by_stem(base / group).values()] for group in groups}


def _pairs(card: Card, source: DenseSource, base: Path, split: str) -> list[dict[str, Path]]:
    folders = {name: _by_stem(base / folder) for name, folder in _folders(source, split).items()}
    for name, pattern in source.maps.items():
        odd = sorted(folders["image"].keys() ^ folders[name].keys())
        if odd:
            lacks = name if odd[0] in folders["image"] else "image"
            where = shown_path(base / (source.image if lacks == "image" else pattern).format(split=split))
            raise UserError(f"{card.shown}: '{odd[0]}' of split '{split}' has no {lacks} file under {where}. {fix(card)}")
    return [{name: folder[stem] for name, folder in folders.items()} for stem in folders["image"]]


def _reader(source: DenseSource, classes: int, pairs: list[dict[str, Path]]) -> Callable[[int], dict[str, Tensor]]:
    def read(i: int) -> dict[str, Tensor]:
        paths = pairs[i]
        out = {"image": decode_file(paths["image"])}
        for name in source.maps:
            if name == "label":
                out |= read_label(paths[name], classes, source.void)
            else:
                out |= read_depth_mm(paths[name]) if name == "depth_mm" else read_normal(paths[name])
            size = next(reversed(out.values())).shape[-2:]
            if size != out["image"].shape[-2:]:
                raise UserError(f"{paths[name]}: the map is {tuple(size)}, its image is {tuple(out['image'].shape[-2:])}.")
        return out

    return read


def open_dense(card: Card | str, split: str = "all", *, root: Path | None = None) -> DenseSet:
    """The pairs of `split` ('all' = every split); ids are the image's path inside the set.

    Raises UserError when the set, a split or one map of a pair is missing, and later, naming the file, on damaged files.
    """
    card = card if isinstance(card, Card) else load_card(card)
    sources = [source for source in card.sources if isinstance(source, DenseSource)]
    if not sources:
        raise UserError(f"{card.shown}: is a set of {card.sources[0].kind} images without maps; open it with open_images.")
    if split != "all" and split not in card.splits:
        raise UserError(f"{card.shown}: no split '{split}'.{near(split, [*card.splits, 'all'])}")
    for source in sources:
        base = place(card, source, root)
        if base is None or (split != "all" and split not in source.splits):
            continue
        strange = next((name for name in source.maps if name not in MAP_KINDS), None)
        if strange is not None:
            raise UserError(f"{card.shown}: map '{strange}' is not known.{near(strange, MAP_KINDS)}")
        parts = {name: _pairs(card, source, base, name) for name in (source.splits if split == "all" else [split])}
        verify_counts(card, source, base, {name: len(pairs) for name, pairs in parts.items()}, {})
        pairs = [pair for part in parts.values() for pair in part]
        names = card.read_json(card.names) if card.names else [str(k) for k in range(card.classes)]
        ids = [pair["image"].relative_to(base).as_posix() for pair in pairs]
        return DenseSet(card.name, split, names, source.void, list(source.maps), ids, _reader(source, len(names), pairs))
    raise not_found(card, split, root)
