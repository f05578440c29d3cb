"""The embedded stereo pair: geometry of its tiles, disjoint splits, cards that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.dense_copies import valid
from PIL import Image

from vismt.base.errors import UserError
from vismt.data import source_types
from vismt.data.cards import load_card
from vismt.data.check import check
from vismt.data.formats.stereo import read_pair, tiles
from vismt.data.images import open_images
from vismt.data.maps.dense_sample import size_of
from vismt.data.maps.dense_set import open_dense


def test_tiles_of_the_motorcycle():
    data = open_dense("motorcycle", "test")
    assert (
        len(data) == 6 and len(open_dense("motorcycle", "train")) == 48 and data.targets == ["edge", "depth", "normals"]
    )
    assert data.where == "the scikit-image package" and check("motorcycle").ok
    sample = data.read(5)  # tyre on the floor
    assert (
        size_of(sample) == (160, 128) and sample["image"].dtype == torch.float32 and sample["edge"].dtype == torch.int64
    )
    has_depth = sample["depth"] > 0
    assert sample["depth"][has_depth].min() > 2 and sample["depth"].max() < 5.1 and has_depth.float().mean() > 0.9
    assert torch.equal(sample["edge"] != 255, has_depth) and 0 < (sample["edge"] == 1).float().mean() < 0.1
    # The floor, below right: its normal points up, a little towards the camera.
    floor = sample["normals"][:, 100:, 100:].flatten(1)
    floor = floor[:, (floor != 0).any(0)].median(dim=1).values
    assert floor[1] > 0.95 and abs(float(floor[0])) < 0.1
    assert torch.equal(open_dense("motorcycle", "test").read(5)["normals"], sample["normals"])


def test_splits_share_no_pixel_and_derive_from_their_own():
    card = load_card("motorcycle")
    source = card.sources[0]
    height, wide = 500, source.tile[1]
    spans = {name: [left for _, left in tiles(source, height, name)] for name in ("train", "test")}
    assert max(spans["train"]) + wide == 477 < 485 == min(spans["test"]) and max(spans["test"]) + wide == 741
    tops = {top for top, _ in tiles(source, height, "test")}
    assert tops == {0, 170, 340} and len(set(tiles(source, height, "train"))) == 48
    # The first column of the test region has no normal: nothing left of it was looked at.
    sample = open_dense("motorcycle", "test").read(0)
    assert not valid("normals", sample["normals"])[:, 0].any() and valid("normals", sample["normals"])[:, 40].any()


def test_depth_by_hand():
    source = load_card("motorcycle").sources[0]
    (base,) = source.candidates(load_card("motorcycle"))
    disparity = np.load(base / "data" / source.disparity)["arr_0"]
    depth = read_pair(source, base)["depth"]
    assert np.array_equal(np.isfinite(disparity), depth.numpy() > 0)
    row, column = 400, 100
    # 994.978 px * 193.001 mm / (disparity + 31.086 px)
    assert abs(float(depth[row, column]) - 994.978 * 0.193001 / (float(disparity[row, column]) + 31.086)) < 1e-6


TILES = """  - kind: stereo_tiles
    image: l.png
    disparity: d.npz
    camera: {fx: 9.0, fy: 9.0, cx: 5.0, cy: 4.0}
    baseline: 0.1
    offset: 1.0
    tile: [4, 4]
    columns: {train: [0, 6], test: [6, 12]}
    grid: {train: [2, 2], test: [1, 1]}
    splits: {train: 4, test: 1}
"""


@pytest.fixture
def package(home, monkeypatch):
    """A made package folder with a pair of 8 x 12 pixels, one of them without disparity."""
    (home / "skimage" / "data").mkdir(parents=True)
    disparity = np.full((8, 12), 2.0)
    disparity[0, 0] = np.inf
    np.savez(home / "skimage" / "data" / "d.npz", disparity)
    Image.new("RGB", (12, 8)).save(home / "skimage" / "data" / "l.png")
    monkeypatch.setattr(source_types, "package_folder", lambda module: home / "skimage")
    return home / "skimage" / "data"


def test_made_pair(package, write_card):
    data = open_dense(write_card(TILES))
    assert data.ids == ["train/000_000", "train/000_002", "train/004_000", "train/004_002", "test/000_006"]
    depth = data.read(0)["depth"]
    assert depth[0, 0] == 0 and torch.allclose(depth[1:], torch.tensor(0.3))  # 9 * .1 / (2 + 1)
    before = data.content(0)
    Image.new("RGB", (12, 8), "red").save(package / "l.png")
    assert open_dense(write_card(TILES)).content(0) not in (before, "")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("tile: [4, 4]", "tile: [4, 7]", r"tiles of \[4, 7\] do not fit into the columns"),
    ("test: [6, 12]", "test: [6, 13]", "do not fit into the columns"),
    ("test: [6, 12]", "test: [5, 12]", "the columns .* of the splits must not overlap"),
    ("test: [1, 1]", "tst: [1, 1]", r"'columns' and 'grid' two for each of \['test', 'train'\]"),
    ("tile: [4, 4]", "tile: [4]", "'tile' must be two counts"),
    ("fx: 9.0", "fx: 0.0", "fx and fy above 0"),
    ("train: 4,", "train: 5,", r"4 of 5 images found .*split 'train'"),
    ("image: l.png", "image: m.png", "the installed scikit-image has no 'm.png'"),
])  # fmt: skip
def test_cards_that_do_not_fit(package, write_card, old, new, message):
    with pytest.raises(UserError, match=message):
        open_dense(write_card(TILES.replace(old, new)))


def test_damaged_pair_and_wrong_doors(package, write_card, monkeypatch):
    path = write_card(TILES)
    with pytest.raises(UserError, match="open it with open_dense"):
        open_images(path)
    np.savez(package / "d.npz", np.zeros((3, 3)))
    with pytest.raises(UserError, match=r"d.npz: the disparity is \(3, 3\), its image is \(8, 12\)"):
        open_dense(path)
    (package / "d.npz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"d.npz: cannot be decoded .*Install scikit-image again"):
        open_dense(path)
    monkeypatch.setattr(source_types, "package_folder", lambda module: None)
    with pytest.raises(UserError, match=r"motorcycle: needs scikit-image, which is not installed: pip install"):
        open_dense("motorcycle")
