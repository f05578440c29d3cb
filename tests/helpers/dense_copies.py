"""Made copies of public sets of maps in the layouts that they are published in, each of which states its counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from helpers.blobs import blobs
from vismt.data.maps.dense_sample import IGNORE, LABELS, NO_CLASS, is_class

SPLITS = ("train", "val")


def put(path: Path, values: np.ndarray) -> None:
    """Write an array by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values)
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)


def part_annotation(objects: list) -> dict:
    """`anno` as PASCAL-Part stores it: image name, objects of (class name, class, mask, parts of (name, mask))."""
    objects_array = np.zeros((1, len(objects)), dtype=[(n, "O") for n in ("class", "class_ind", "mask", "parts")])
    for k, (number, mask, parts) in enumerate(objects):
        inner = np.zeros((1, len(parts)) if parts else (0, 0), dtype=[("part_name", "O"), ("mask", "O")])
        for j, (name, where) in enumerate(parts):
            inner[0, j] = (name, where)
        objects_array[0, k] = ("x", number, mask, inner)
    anno = np.zeros((1, 1), dtype=[("imname", "O"), ("objects", "O")])
    anno[0, 0] = ("a", objects_array)
    return {"anno": anno}


def scene(number: int, classes: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return an image, its labels, depth in metres, normals and edges, of smooth random regions."""
    noise = blobs(*size, 4, number)
    labels = (noise * classes).astype(np.int64).clip(0, classes - 1)
    edge = np.zeros(size, bool)
    edge[1:] = labels[1:] != labels[:-1]
    normals = np.stack([noise - 0.5, 0.5 - noise, np.ones(size)], -1)
    image = np.stack([noise, 1 - noise, blobs(*size, 1, 100 + number)], -1)
    return {
        "image": image,
        "bytes": (255 * image).astype(np.uint8),
        "labels": labels,
        "depth": 1 + 3 * noise,
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "edge": edge,
    }


def bytes_of(normals: np.ndarray) -> np.ndarray:
    return (127.5 * (normals + 1)).round().astype(np.uint8)


def write_arrays(base: Path, split: str, number: int, size: tuple[int, int], classes: int, label: str) -> None:
    """Write an image as MTAN and LibMTL store it."""
    values = scene(number, classes, size)
    files = {"image": values["image"], label: values["labels"].astype(float), "depth": values["depth"][..., None]}
    for name, array in {**files, "normal": values["normals"]}.items():
        put(base / split / name / f"{number}.npy", array)


def write_nyud(base: Path, split: str, number: int, size: tuple[int, int]) -> None:
    """Write an image as MTI-Net and InvPT store it."""
    values = scene(number, 40, size)
    put(base / "images" / f"{number}.jpg", values["bytes"])
    put(base / "segmentation" / f"{number}.png", (values["labels"] + 1).astype(np.uint8))
    put(base / "depth" / f"{number}.npy", values["depth"].astype(np.float32))
    put(base / "normals" / f"{number}.png", bytes_of(values["normals"]))
    put(base / "edge" / f"{number}.png", (255 * values["edge"]).astype(np.uint8))
    add_to_list(base / "gt_sets" / f"{split}.txt", str(number))


def write_pascal(base: Path, split: str, number: int, size: tuple[int, int]) -> None:
    """Write an image as ASTMT stores it; people are on the even ones."""
    values = scene(number, 21, size)
    top = np.zeros(size, np.uint8)
    top[: size[0] // 2] = 1
    put(base / "JPEGImages" / f"{number}.jpg", values["bytes"])
    put(base / "semseg" / "VOC12" / f"{number}.png", values["labels"].astype(np.uint8))
    put(base / "semseg" / "pascal-context" / f"{number}.png", values["labels"].astype(np.uint8))
    put(base / "normals_distill" / f"{number}.png", bytes_of(values["normals"]))
    put(base / "sal_distill" / f"{number}.png", 200 * top)
    person = (15, np.ones(size, np.uint8), [("head", top), ("torso", 1 - top)])
    annotation = part_annotation([person] if number % 2 == 0 else [(3, top, [("head", top)])])
    floor = np.where(values["edge"], 360, 158)  # the sky has no normals
    for folder, content in (("human_parts", annotation), ("pascal-context/trainval", {"LabelMap": floor})):
        (base / folder).mkdir(parents=True, exist_ok=True)
        savemat(base / folder / f"{number}.mat", content)
    add_to_list(base / "ImageSets" / "Context" / f"{split}.txt", str(number))


def write_taskonomy(base: Path, split: str, number: int, size: tuple[int, int]) -> None:
    """Write an image of the building of its split as Taskonomy stores it."""
    values = scene(number, 17, size)
    maps = {
        "rgb": values["bytes"],
        "segment_semantic": (values["labels"] + 1).astype(np.uint8),
        "depth_zbuffer": (512 * values["depth"]).astype(np.uint16),
        "normal": bytes_of(values["normals"]),
        "edge_texture": (9000 * values["edge"]).astype(np.uint16),
    }
    for name, array in maps.items():
        put(base / f"home_{split}" / name / f"point_{number}_view_0_domain_{name.replace('_sem', 'sem')}.png", array)
    if number % 100 == 0:
        add_to_list(base / "splits" / f"{split}.txt", f"home_{split}")


def add_to_list(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")


WRITERS = {
    "nyuv2": ("nyuv2", lambda *image: write_arrays(*image, 13, "label")),
    "cityscapes": ("cityscapes", lambda *image: write_arrays(*image, 7, "label_7")),
    "cityscapes19": ("cityscapes", lambda *image: write_arrays(*image, 19, "label_19")),
    "nyud_mt": ("NYUDv2", write_nyud),
    "pascal_context": ("PASCAL_MT", write_pascal),
    "taskonomy": ("taskonomy", write_taskonomy),
}


def write_copy(data: Path, card: str, counts: tuple[int, int], size: tuple[int, int]) -> Path:
    """Write a copy of a shipped card's set with `counts` images for training and testing; return its folder."""
    root, write = WRITERS[card]
    base = data / root
    for part, (split, count) in enumerate(zip(SPLITS, counts)):
        for number in range(count):
            write(base, split, 100 * part + number, size)
    (base / "subset.yaml").write_text(f"train: {counts[0]}\nval: {counts[1]}\n")
    return base


def valid(target: str, values: Tensor) -> Tensor:
    """Return bool (..., h, w), where a map of `target` has a value.

    values: (..., h, w), for normals (..., 3, h, w), for classes (...), which give bool (...).
    """
    if is_class(target):
        return values != NO_CLASS
    if target in LABELS:
        return values != IGNORE
    return values > 0 if target == "depth" else (values != 0).any(dim=-3)
