"""The shipped layouts read from tiny made copies, with the cards that ship; and what is wrong with a copy names itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from helpers.dense_copies import part_annotation, put, valid
from scipy.io import savemat

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.formats.pascal_context import read_context
from vismt.data.maps.dense_sample import size_of
from vismt.data.maps.dense_set import open_dense
from vismt.storage.paths import shipped

H, W = 4, 6


@pytest.fixture
def small(home):
    """small(name, counts): the shipped card with these counts, in the user's folder; the copy goes to $VISMT_DATA."""

    def write(name, **splits):
        source = shipped("datasets") / name
        card = yaml.safe_load((source / "card.yaml").read_text())
        card["sources"][0]["splits"] = splits
        folder = home / "cards" / name
        folder.mkdir(parents=True)
        for extra in source.glob("*.json"):
            (folder / extra.name).write_text(extra.read_text())
        (folder / "card.yaml").write_text(yaml.safe_dump(card))
        return folder, home / "data" / card["sources"][0]["root"]

    return write


def libmtl(base, split, i, label="label"):
    labels = np.full((H, W), -1.0)
    labels[:, 2:] = i
    put(base / split / "image" / f"{i}.npy", np.full((H, W, 3), 0.25))
    put(base / split / label / f"{i}.npy", labels)
    depth = np.full((H, W, 1), 1.5)
    depth[0, 0] = 0
    put(base / split / "depth" / f"{i}.npy", depth)


def test_nyuv2_of_libmtl(small):
    card, base = small("nyuv2", train=2, val=1)
    for split, i in (("train", 0), ("train", 1), ("val", 0)):
        libmtl(base, split, i)
        normal = np.zeros((H, W, 3))
        normal[1:] = (0.6, 0, 0.8)
        put(base / split / "normal" / f"{i}.npy", normal)
    data = open_dense(card, "train")
    assert data.ids == ["train/image/0.npy", "train/image/1.npy"] and data.targets == ["semseg", "depth", "normals"]
    assert len(open_dense(card)) == 3 and data.classes[1] == "books" and not data.inverse_depth
    sample = data.read(1)
    assert size_of(sample) == (H, W) and (sample["image"] == 0.25).all()
    assert (sample["semseg"][:, :2] == 255).all() and (sample["semseg"][:, 2:] == 1).all()
    assert sample["depth"][0, 0] == 0 and sample["depth"][1, 1] == 1.5
    assert torch.allclose(sample["normals"][:, 1, 0], torch.tensor([0.6, 0, 0.8])) and not sample["normals"][:, 0].any()
    assert check(card).ok
    (base / "val" / "depth" / "0.npy").unlink()
    assert "'0' of split 'val' has no depth_m file under $VISMT_DATA/nyuv2/val/depth" in check(card).problem
    (base / "train" / "image" / "1.npy").unlink()
    assert "'1' of split 'train' has no image file" in check(card).problem


@pytest.mark.parametrize("name", ["cityscapes", "cityscapes19"])
def test_cityscapes_of_libmtl(small, name):
    card, base = small(name, train=1)
    libmtl(base, "train", 0, label={"cityscapes": "label_7", "cityscapes19": "label_19"}[name])
    data = open_dense(card, "train")
    assert (
        data.inverse_depth
        and len(data.classes) == (7 if name == "cityscapes" else 19)
        and size_of(data.read(0)) == (H, W)
    )


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_nyud_of_invpt_and_mti(small, suffix):
    card, base = small("nyud_mt", train=1, val=1)
    for name in ("1", "2"):
        put(base / "images" / f"{name}{'.png' if suffix == '.png' else '.jpg'}", np.full((H, W, 3), 51, np.uint8))
        labels = np.full((H, W), 40, np.uint8)
        labels[0] = 0
        put(base / "segmentation" / f"{name}.png", labels)
        put(base / "depth" / f"{name}.npy", np.full((H, W), 2.0, np.float32))
        edge = np.zeros((H, W), np.uint8)
        edge[2] = 255
        # 2 v / 255 - 1 of (128, 128, 255) is (.004, .004, 1); (128, 128, 128) has no direction.
        normal = np.full((H, W, 3), 128, np.uint8)
        normal[1:, :, 2] = 255
        floats = normal / 127.5 - 1
        put(base / "edge" / f"{name}{suffix}", edge if suffix == ".png" else edge / 255.0)
        put(base / "normals" / f"{name}{suffix}", normal if suffix == ".png" else floats)
    (base / "gt_sets").mkdir()
    (base / "gt_sets" / "train.txt").write_text("2\n")
    (base / "gt_sets" / "val.txt").write_text("1\n\n")
    data = open_dense(card, "train")
    assert data.targets == ["semseg", "edge", "depth", "normals"] and data.ids[0].startswith("images/2.")
    sample = data.read(0)
    assert (
        (sample["semseg"][0] == 255).all() and (sample["semseg"][1:] == 39).all() and data.classes[39] == "other prop"
    )
    assert sample["edge"].sum(1).tolist() == [0, 0, W, 0] and sample["image"].allclose(torch.tensor(0.2), atol=1e-2)
    assert not valid("normals", sample["normals"])[0].any() and (sample["normals"][2, 1:] > 0.99).all()
    assert check(card).ok
    (base / "gt_sets" / "val.txt").write_text("9\n")
    with pytest.raises(UserError, match=r"'9' of split 'val' has no image file under \$VISMT_DATA/NYUDv2/images"):
        open_dense(card, "val")
    (base / "gt_sets" / "val.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"2 of 1 images found .*split 'val'"):
        open_dense(card, "val")
    (base / "gt_sets" / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"gt_sets/val.txt is empty"):
        open_dense(card, "val")
    (base / "gt_sets" / "val.txt").unlink()
    with pytest.raises(UserError, match=r"missing list .*gt_sets/val.txt"):
        open_dense(card, "val")


def test_pascal_context_of_astmt(small):
    card, base = small("pascal_context", train=2)
    full, top, left = (np.zeros((H, W), np.uint8) for _ in range(3))
    full[:], top[0], left[1:, 0] = 1, 1, 1
    labels = np.full((H, W), 360)  # sky, which NYUv2 does not have
    labels[:, 3:] = 158  # floor
    people = [
        (15, full, [("leye", top), ("rfoot", left)]),
        (7, full, []),
        (15, full, []),
    ]  # the last: no parts, so background
    for name, objects in (("a", people), ("b", [(3, full, [("head", top)])])):
        put(base / "JPEGImages" / f"{name}.jpg", np.zeros((H, W, 3), np.uint8))
        put(base / "normals_distill" / f"{name}.png", np.full((H, W, 3), (128, 128, 255), np.uint8))
        put(base / "sal_distill" / f"{name}.png", (top * 200).astype(np.uint8))
        for folder, values in (
            ("human_parts", part_annotation(objects)),
            ("pascal-context/trainval", {"LabelMap": labels}),
        ):
            (base / folder).mkdir(parents=True, exist_ok=True)
            savemat(base / folder / f"{name}.mat", values)
    put(base / "semseg" / "VOC12" / "a.png", np.full((H, W), 15, np.uint8))
    put(base / "semseg" / "pascal-context" / "a.png", np.full((H, W), 3, np.uint8))
    put(base / "semseg" / "pascal-context" / "b.png", np.full((H, W), 255, np.uint8))
    (base / "ImageSets" / "Context").mkdir(parents=True)
    (base / "ImageSets" / "Context" / "train.txt").write_text("a\nb\n")
    data = open_dense(card, "train")
    assert data.targets == ["semseg", "parts", "saliency", "edge", "normals"] and data.parts[6] == "lower leg"
    a, b = data.read(0), data.read(1)
    assert (a["semseg"] == 15).all() and (b["semseg"] == 255).all()
    assert a["parts"].tolist() == [[1] * W] + [[6] + [0] * (W - 1)] * (H - 1) and "parts" not in b
    assert a["edge"].tolist() == [[0, 0, 1, 0, 0, 0]] * H and a["saliency"].sum(1).tolist() == [W, 0, 0, 0]
    assert valid("normals", a["normals"]).tolist() == [[False] * 3 + [True] * 3] * H
    savemat(base / "human_parts" / "a.mat", part_annotation([(15, full, [("wing", top)])]))
    with pytest.raises(UserError, match=r"human_parts/a.mat: not an annotation of PASCAL-Part \(KeyError: 'wing'\)"):
        data.read(0)
    savemat(base / "human_parts" / "a.mat", {"other": 1})
    with pytest.raises(UserError, match=r"a.mat: has no variable 'anno', holds \['other'\]"):
        data.read(0)
    (base / "human_parts" / "a.mat").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a.mat: cannot be decoded"):
        data.read(0)


def test_context_edges_are_one_pixel_wide(tmp_path):
    # A step: the pixels left of and above the change are (0,0), (1,0), (1,1), (2,1), (3,1). Without (1,1) the line holds
    # together, and then (1,0) is needed. 255 is a class here.
    savemat(tmp_path / "a.mat", {"LabelMap": np.array([[255, 9, 9], [255, 9, 9], [255, 255, 9], [255, 255, 9]])})
    edge = read_context(tmp_path / "a.mat", {})["edge"]
    assert edge.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_taskonomy_with_domains_missing(small):
    card, base = small("taskonomy", train=None, val=None)
    (base / "splits").mkdir(parents=True)
    (base / "splits" / "train.txt").write_text("ackermanville\n")
    (base / "splits" / "val.txt").write_text("beechwood\n")
    for building in ("ackermanville", "beechwood", "unlisted"):
        for view in ("point_0_view_0", "point_0_view_1"):
            put(base / building / "rgb" / f"{view}_domain_rgb.png", np.zeros((H, W, 3), np.uint8))
    room, view = base / "ackermanville", "point_0_view_0"
    put(
        room / "segment_semantic" / f"{view}_domain_segmentsemantic.png",
        np.arange(H * W, dtype=np.uint8).reshape(H, W) % 18,
    )
    depth = np.full((H, W), 1024, np.uint16)
    depth[0] = 65535
    put(room / "depth_zbuffer" / f"{view}_domain_depth_zbuffer.png", depth)
    put(room / "edge_texture" / f"{view}_domain_edge_texture.png", np.full((H, W), 4000, np.uint16) * (depth == 1024))
    data = open_dense(card, "train")
    assert len(data) == 2 and data.targets == ["semseg", "edge", "depth"] and "ackermanville/rgb/" in data.ids[0]
    first, second = data.read(0), data.read(1)
    assert first["semseg"][0].tolist() == [255, 0, 1, 2, 3, 4] and set(second) == {"image"}
    # 1024 / 512 = 2 m; 4000 of 65535 is 6 %, above the 5 % of the card.
    assert first["depth"][1:].unique().tolist() == [2.0] and not first["depth"][0].any()
    assert first["edge"].sum(1).tolist() == [0, W, W, W]
    assert open_dense(card, "val").targets == [] and check(card).images == 4


@pytest.mark.parametrize(("name", "values", "message"), [
    ("image", np.full((H, W, 3), 7.0), r"must lie in \[0, 1\], are 7 to 7"),
    ("image", np.zeros((H, W)), r"an image must be \(h, w, 3\) of bytes or floats"),
    ("label", np.full((H, W), 13.0), r"label 13 found, but there are 13 classes \(void -1\)"),
    ("label", np.full((H, W), 0.5), "label 0.5 found"),
    ("label", np.full((H, W), np.nan), "label nan found"),
    ("label", np.zeros((H, W, 2)), "a label map must be one channel of numbers, is float64"),
    ("depth", np.zeros((H, W, 1), np.int64), "a depth map must be one channel of floats, is int64"),
    ("depth", np.ones((H + 1, W)), r"depth/0.npy: the map is \(5, 6\), its image is \(4, 6\)"),
    ("normal", np.zeros((3, H, W)), r"a normal map must be \(h, w, 3\) of floats"),
    ("normal", None, "normal/0.npy: cannot be decoded"),
])  # fmt: skip
def test_values_that_a_map_cannot_hold(small, name, values, message):
    card, base = small("nyuv2", train=1)
    libmtl(base, "train", 0)
    put(base / "train" / "normal" / "0.npy", np.zeros((H, W, 3)))
    path = base / "train" / name / "0.npy"
    path.write_bytes(b"no array") if values is None else put(path, values)
    with pytest.raises(UserError, match=message):
        open_dense(card, "train").read(0)


def test_two_files_of_one_id_and_a_depth_image_taken_for_metres(small):
    card, base = small("nyuv2", train=1)
    libmtl(base, "train", 0)
    put(base / "train" / "normal" / "0.npy", np.zeros((H, W, 3)))
    put(base / "train" / "depth" / "0.png", np.zeros((H, W), np.uint8))
    with pytest.raises(UserError, match=r"depth/0.png: '0.npy' has the same id. Remove one of them"):
        open_dense(card, "train")
    (base / "train" / "depth" / "0.npy").unlink()
    with pytest.raises(
        UserError, match=r"depth/0.png: depth_m is read from .npy files; an image of millimetres is depth_mm"
    ):
        open_dense(card, "train").read(0)


DENSE = (
    '  - {kind: dense, root: d, image: "{split}/rgb", maps: {depth_mm: "{split}/depth"}, splits: {train: 1, test: 1}%s}'
)


@pytest.mark.parametrize(("change", "message"), [
    (DENSE % ", derive: {edge: semseg}", r"cannot derive edge from semseg of \['depth'\]"),
    (DENSE % ", derive: {parts: depth}", "cannot derive parts from depth .*known: normals from depth, edge from semseg"),
    (DENSE % ", derive: {normals: depth}", "camera {} must give fx, fy, cx, cy in pixels"),
    (DENSE % ", axes: [1, 2, 1]", r"axes \[1, 2, 1\] must be three signs"),
    ((DENSE % "").replace('"{split}/rgb"', "rgb"), "image 'rgb' has no {split}: name one split 'all', or give 'listed'"),
    ((DENSE % ", listed: l.txt").replace('"{split}/rgb"', "rgb"), "image 'rgb' has no {split}: .* or give 'listed' with {split}"),
    (DENSE % ", edge_above: -0.1", "edge_above is -0.1; it must be at least 0"),
    ((DENSE % "").replace("{split}/rgb", "{splt}/rgb"), "'{splt}/rgb' may hold {split} and {group}, and {id} once"),
    ((DENSE % "").replace("{split}/depth", "{id}/depth"), "'{id}/depth' may hold"),
    ((DENSE % "").replace("maps: {", 'maps: {depth_m: "x", '), r"become \['depth', 'depth'\]; each target once"),
    ((DENSE % ", derive: {edge: depth}").replace("depth_mm", "inverse_depth"), "nothing is derived from inverse_depth"),
    ((DENSE % "").replace("{split}/depth", "../depth"), "'../depth' must be a relative path"),
])  # fmt: skip
def test_bad_dense_cards(write_card, change, message):
    with pytest.raises(UserError, match=message):
        open_dense(write_card(change))


def test_derived_targets_and_wrong_names(write_card, home):
    base = home / "data" / "d" / "all"
    put(base / "rgb" / "x.png", np.zeros((9, 9, 3), np.uint8))
    put(base / "depth" / "x.png", np.full((9, 9), 2000, np.uint16))
    derive = ", derive: {normals: depth, edge: depth}, camera: {fx: 9.0, fy: 9.0, cx: 4.0, cy: 4.0}"
    path = write_card((DENSE % derive).replace("train: 1, test: 1", "all: 1"))
    data = open_dense(path)
    assert data.targets == ["edge", "depth", "normals"]
    sample = data.read(0)
    assert sample["normals"][:, 4, 4].tolist() == [0, 0, 1] and not sample["edge"].any()
    # What is done to a sample is done before edges are derived.
    assert data.edges == "depth" and "edge" not in data.stored(0)
    nearer = data.read(0, lambda sample: {**sample, "depth": sample["depth"].index_fill(1, torch.tensor([3]), 1.0)})
    assert nearer["edge"].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0]] * 9
    before = data.content(0)
    assert before == open_dense(path).content(0)
    put(base / "depth" / "x.png", np.full((9, 9), 2001, np.uint16))
    assert data.content(0) not in (before, "")


@pytest.mark.parametrize(("classes", "options", "content", "message"), [
    (255, "", None, None),
    (256, "", None, "256 classes; a label map may have 255, as 255 marks pixels without a label"),
    (255, "edge_above: 1, ", None, "edge/x.png: edge_above 1 is a share of the largest value of an image; give one below 1"),
    (2, "", ["one"], "j.json: must map class to name, or list 2 names"),
    (2, "", 5, "j.json: must map class to name, or list 2 names"),
    (2, "", "ab", "j.json: must map class to name, or list 2 names"),
    (2, "normal_classes: j.json, ", [1], r"j.json: must map class to number \(int\), holds \[1\]"),
    (2, "normal_classes: j.json, ", {"a": 1, "b": 1.5}, r"j.json: must map class to number \(int\), holds {'b': 1.5}"),
])  # fmt: skip
def test_classes_and_names_that_maps_cannot_have(write_card, home, classes, options, content, message):
    base = home / "data" / "d"
    put(base / "rgb" / "x.png", np.zeros((H, W, 3), np.uint8))
    put(base / "label" / "x.npy", np.full((H, W), classes - 1))
    put(base / "edge" / "x.png", np.full((H, W), 255, np.uint8))
    names = "names: j.json" if content and not options else ""
    path = write_card(
        f"  - {{kind: dense, root: d, image: rgb, {options}maps: {{label: label, edge: edge}}}}",
        classes=classes,
        extra=names,
    )
    path.with_name("j.json").write_text(json.dumps(content))
    if message is None:
        sample = open_dense(path).read(0)
        assert (sample["semseg"] == 254).all() and sample["edge"].all()
    else:
        with pytest.raises(UserError, match=message):
            open_dense(path).read(0)
