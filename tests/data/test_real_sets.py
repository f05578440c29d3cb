"""The real sets found through VISMT_DATA: counts, one decode, and hashes."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.dense_copies import valid
from PIL import Image
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.seeds import digest
from vismt.data.check import check
from vismt.data.division import divide
from vismt.data.formats.torchvision_sets import MEMBER_DIGITS
from vismt.data.images import open_images
from vismt.data.maps.dense_sample import size_of
from vismt.data.maps.dense_set import open_dense
from vismt.data.maps.derived_maps import normals_from_depth
from vismt.data.near_duplicates import groups_of
from vismt.storage.paths import data_roots, shipped

ROOT = next(iter(data_roots()), None)
LABELLED = {  # name: (split, images, classes)
    "cifar10-6000": ("test", 1000, 10),
    "cifar100-8000": ("all", 8000, 100),
    "grocery": ("all", 5421, 81),
    "flowers102-2843": ("all", 2843, 89),
    "dtd10": ("all", 1000, 10),
    "gtsrb-2140": ("all", 2140, 43),
    "blood_cells": ("all", 1200, 12),
    "fashion_mnist-6000": ("all", 6000, 10),
    "mnist-4000": ("train", 3000, 10),
    "omniglot-4840": ("all", 4840, 242),
}
DENSE = {"camvid": (367, 101, 233), "rgbd_7scenes": (170, 56)}


def need(name: str) -> None:
    if ROOT is None or not (ROOT / name.partition("-")[0]).is_dir():
        pytest.skip(f"'{name}' is not under VISMT_DATA")


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "blocks"), [("camvid", 12), ("rgbd_7scenes", 7)])
def test_neighbouring_frames_are_in_one_block(name, blocks):
    need(name)
    images = open_dense(name, "test")
    assert images.group_unit == "blocks of frames" and images.groups is not None
    groups = [images.groups[frame] for frame in images.ids]
    assert len(set(groups)) == blocks == 1 + sum(a != b for a, b in pairwise(groups))


@pytest.mark.realdata
@pytest.mark.parametrize("name", LABELLED)
def test_counts_and_one_decode(name):
    need(name)
    split, count, classes = LABELLED[name]
    images = open_images(name, split)
    assert (len(images), len(images.classes)) == (count, classes)
    assert set(images.labels.tolist()) == set(range(classes)) and len(set(images.ids)) == count
    image = images.read(count // 2)
    assert (
        image.dtype == torch.uint8
        and image.shape[0] == 3
        and 28 <= max(image.shape[1:]) <= 84
        and image.float().std() > 1
    )


@pytest.mark.realdata
@pytest.mark.parametrize("name", [*LABELLED, *DENSE])
def test_check_passes(name):
    need(name)
    report = check(name, decode=False)  # the hashes cover the bytes
    assert report.ok, str(report)
    assert report.groups


@pytest.mark.parametrize("name", ["digits", "photo_crops"])
def test_check_passes_on_embedded_sets(name):
    pytest.importorskip("sklearn" if name == "digits" else "skimage")
    assert check(name).ok


@pytest.mark.realdata
def test_a_reduced_copy_is_not_taken_for_the_whole_set(monkeypatch, tmp_path):
    need("flowers102-2843")
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        open_images("flowers102", "test")
    assert str(caught.value) == (
        "datasets/flowers102: nothing found under $VISMT_CACHE/torchvision/flowers102."
        " `vismt data prepare flowers102` downloads it, or see datasets/flowers102/card.yaml."
    )


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cifar100-8000", "fashion_mnist-6000", "mnist-4000"])
def test_members_are_the_pixels_of_the_copy(name):
    need(name)
    members = json.loads((shipped("datasets") / name / "members.json").read_text())
    for split, digests in members.items():
        images = open_images(name, split)
        assert list(digests) == images.ids
        for i in range(0, len(images), 97):
            pixels = images.read(i).permute(1, 2, 0).numpy()
            stored = pixels if name.startswith("cifar") else pixels[..., 0]
            assert digest(stored.tobytes())[:MEMBER_DIGITS] == digests[images.ids[i]]


@pytest.mark.realdata
def test_grocery_superclasses_are_the_publisher_s():
    need("grocery")
    published = json.loads((ROOT / "grocery" / "classes.json").read_text())
    images = open_images("grocery", "val")
    assert {c: images.superclass_names[images.superclass[k]] for k, c in enumerate(images.classes)} == {
        name: entry["coarse"] for name, entry in published.items()
    }
    assert len(images.superclass_names) == 43 and len(set(images.labels.tolist())) == 60


@pytest.mark.realdata
def test_cifar100_and_omniglot_hierarchies():
    need("cifar100-8000")
    need("omniglot-4840")
    cifar = open_images("cifar100-8000")
    assert torch.bincount(cifar.superclass).tolist() == [5] * 20
    assert cifar.superclass_names[cifar.superclass[cifar.classes.index("maple_tree")]] == "trees"
    omniglot = open_images("omniglot-4840")
    alphabet = omniglot.superclass_names[omniglot.superclass[0]]
    assert omniglot.classes[0].startswith(alphabet + "/")
    # Published drawings are black ink on white paper: most of an image is 255.
    assert omniglot.read(0).float().mean() > 200


@pytest.mark.realdata
def test_camvid_maps():
    need("camvid")
    assert [len(open_dense("camvid", split)) for split in ("train", "val", "test")] == list(DENSE["camvid"])
    data = open_dense("camvid", "train")
    sample = data.read(0)
    assert size_of(sample) == (180, 240) and data.targets == ["semseg", "edge"]
    # In a street scene the sky is bright and lies above the road: wrong class names would break one of the two.
    sky, road = (sample["semseg"] == data.classes.index(name) for name in ("sky", "road"))
    rows = torch.arange(180.0)[:, None].expand(180, 240)
    assert rows[sky].mean() + 60 < rows[road].mean()
    assert sample["image"][:, sky].float().mean() > 2 * sample["image"][:, road].float().mean()
    labelled = sample["semseg"] != 255
    assert (
        int(sample["semseg"][labelled].max()) <= 10
        and (~labelled).any()
        and torch.equal(labelled, sample["edge"] != 255)
    )
    assert 0.01 < (sample["edge"] == 1).float().mean() < 0.1


@pytest.mark.realdata
def test_rgbd_maps():
    need("rgbd_7scenes")
    assert [len(open_dense("rgbd_7scenes", split)) for split in ("train", "test")] == list(DENSE["rgbd_7scenes"])
    sample = open_dense("rgbd_7scenes", "train").read(0)
    depth, normals = sample["depth"], sample["normals"]
    assert depth.shape == (120, 160) and depth[depth > 0].min() > 0.5 and depth.max() < 5
    good = valid("normals", normals)
    assert 0.3 < good.float().mean() < 1 and torch.allclose(normals.norm(dim=0)[good], torch.ones(()), atol=1e-5)
    # The stored normals are the derived ones, smoothed: the axes agree, and z looks at the camera.
    derived = normals_from_depth(depth, {"fx": 146.25, "fy": 146.25, "cx": 80, "cy": 60})
    both = good & valid("normals", derived)
    angles = (derived * normals).sum(0)[both].clamp(-1, 1).arccos().rad2deg()
    assert angles.median() < 8 and both.float().mean() > 0.5 and (normals[2][good] > 0).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.realdata
def test_frames_of_a_traffic_sign_are_in_one_part() -> None:
    """By the numbers of the files, and by Pillow's own reduction to 16 x 16, beside a division without groups."""
    need("gtsrb-2140")
    images = open_images("gtsrb-2140")
    small = [
        np.asarray(Image.fromarray(images.read(i).permute(1, 2, 0).numpy()).convert("L").resize((16, 16), Image.BOX))
        for i in range(len(images))
    ]
    patches = torch.from_numpy(np.stack(small)).flatten(1).double()
    patches = torch.nn.functional.normalize(patches - patches.mean(1, keepdim=True))
    alike = (patches @ patches.T > 0.9) & (images.labels[:, None] == images.labels)

    def leaks(groups: Tensor | None) -> int:
        parts = divide(images.labels, {"test": 0.4, "validation": 0.15}, "gtsrb-2140", groups)
        others = [~torch.isin(torch.arange(len(images)), index) for index in parts.values()]
        return sum(int(alike[index][:, other].any(1).sum()) for index, other in zip(parts.values(), others))

    groups = groups_of(images)
    assert leaks(groups) <= 20 < 400 < leaks(None)
    for label, signs in {"00": 5, "16": 10, "23": 12, "41": 6}.items():  # files come in rounds, a frame of each sign
        (place,) = [i for i, name in enumerate(images.ids) if name == f"{label}/0001.jpg"]
        assert groups[place] == groups[place + signs] == groups[place + 2 * signs]
