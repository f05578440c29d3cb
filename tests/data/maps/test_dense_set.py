"""Per-pixel maps: values, masks, pairing, and damaged files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers.dense_copies import valid
from PIL import Image, ImageOps

from vismt.base.errors import UserError
from vismt.data.images import open_images
from vismt.data.maps.dense_maps import MapSettings, read_maps
from vismt.data.maps.dense_sample import collate, size_of
from vismt.data.maps.dense_set import classified, open_dense, open_samples
from vismt.data.maps.derived_maps import normals_from_depth

SOURCE = """  - kind: dense
    root: d
    image: "{split}/rgb"
    maps: {label: "{split}/label", depth_mm: "{split}/depth", normal: "{split}/normal"}
    splits: {train: 1}
    void: 11
"""


@pytest.fixture
def room(home, write_card):
    """One 3 x 2 image with its three maps."""
    base = home / "data" / "d" / "train"
    for name in ("rgb", "label", "depth", "normal"):
        (base / name).mkdir(parents=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(base / "rgb" / "7.jpg")
    Image.fromarray(np.array([[0, 1, 11], [1, 1, 0]], np.uint8)).save(base / "label" / "7.png")
    Image.fromarray(np.array([[0, 1000, 2500], [1, 1, 1]], np.uint16)).save(base / "depth" / "7.png")
    # (n + 1) * 127 + 1: n = (0, 0, -1) -> (128, 128, 1); n = (1, 0, 0) -> (255, 128, 128); (0, 0, 0) is none.
    normal = np.zeros((2, 3, 3), np.uint8)
    normal[0, 1], normal[0, 2] = (128, 128, 1), (255, 128, 128)
    Image.fromarray(normal).save(base / "normal" / "7.png")
    return write_card(SOURCE)


def test_values_and_what_is_none(room):
    data = open_dense(room, "train")
    assert len(data) == 1 and data.ids == ["train/rgb/7.jpg"] and data.targets == ["semseg", "depth", "normals"]
    sample = data.read(0)
    assert size_of(sample) == (2, 3) and data.classes == ["0", "1"] and not data.inverse_depth
    assert sample["image"].shape == (3, 2, 3) and sample["image"].dtype == torch.float32
    assert torch.allclose(sample["image"][:, 0, 0] * 255, torch.tensor([1.0, 2.0, 3.0]), atol=1.5)  # a jpg
    assert sample["semseg"].tolist() == [[0, 1, 255], [1, 1, 0]] and sample["semseg"].dtype == torch.int64
    assert sample["depth"][0].tolist() == [0.0, 1.0, 2.5] and sample["depth"].dtype == torch.float32
    assert (
        sample["normals"][:, 0].T.tolist() == [[0, 0, 0], [0, 0, -1], [1, 0, 0]] and not sample["normals"][:, 1].any()
    )
    assert valid("normals", sample["normals"]).tolist() == [[False, True, True], [False] * 3]
    assert valid("depth", sample["depth"])[0].tolist() == [False, True, True]


def test_axes_of_stored_normals(room):
    turned = room.read_text().replace("void: 11", "void: 11\n    axes: [-1, 1, -1]")
    room.write_text(turned)
    assert open_dense(room).read(0)["normals"][:, 0].T.tolist() == [[0, 0, 0], [0, 0, 1], [-1, 0, 0]]


def test_label_outside_the_classes(room, home):
    path = home / "data" / "d" / "train" / "label" / "7.png"
    Image.fromarray(np.full((2, 3), 5, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"label/7.png: label 5 found, but there are 2 classes \(void 11\)"):
        open_dense(room).read(0)


def test_map_of_another_size_or_kind(room, home):
    base = home / "data" / "d" / "train"
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(base / "label" / "7.png")
    with pytest.raises(UserError, match=r"label/7.png: the map is \(2, 2\), its image is \(2, 3\)"):
        open_dense(room).read(0)
    Image.new("RGB", (3, 2)).save(base / "label" / "7.png")
    with pytest.raises(UserError, match="a label map must be one 8-bit channel"):
        open_dense(room).read(0)
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(base / "label" / "7.png")
    (base / "depth" / "7.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"depth/7.png: cannot be decoded"):
        open_dense(room).read(0)


def test_image_without_its_map(room, home):
    (home / "data" / "d" / "train" / "depth" / "7.png").unlink()
    with pytest.raises(UserError, match=r"'7' of split 'train' has no depth_mm file under \$VISMT_DATA/d/train/depth"):
        open_dense(room)


def test_wrong_door_absent_set_and_strange_map(room, home, pets, write_card):
    with pytest.raises(UserError, match="open it with open_dense"):
        open_images(room)
    with pytest.raises(UserError, match="open it with open_images"):
        open_dense(str(pets))
    with pytest.raises(UserError, match=r"no split 'tran'. Near: 'train'"):
        open_dense(room, "tran")
    with pytest.raises(UserError, match=r"datasets/camvid: nothing found under \$VISMT_DATA/camvid"):
        open_dense("camvid")
    with pytest.raises(UserError, match=r"map 'depth' is not known. Near: 'depth_m', 'depth_mm'"):
        open_dense(str(write_card(SOURCE.replace("depth_mm:", "depth:"), name="odd")))


def test_classified_images_as_samples(pets, room, home, paint):
    paint(home / "data" / "pets" / "train" / "dog" / "a.png", 51, size=(9, 4))
    data = open_samples(str(pets), "train")
    assert data.name == "pets" and data.ids == ["train/cat/a.png", "train/cat/b.png", "train/dog/a.png"]
    assert data.targets == ["class"] and data.image_classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1]
    assert data.classes == [] and data.parts == [] and data.where == "$VISMT_DATA/pets"
    samples = [data.read(i) for i in range(3)]
    assert [size_of(sample) for sample in samples] == [(5, 6), (5, 6), (4, 9)] and set(samples[0]) == {"image", "class"}
    assert samples[2]["image"].dtype == torch.float32 and torch.allclose(samples[2]["image"], torch.tensor(0.2))
    assert collate(samples[:2])["class"].tolist() == [0, 0] and samples[2]["class"].item() == 1
    assert len(open_samples(str(pets))) == 5 and [sample["class"].item() for sample in map(data.read, (1, 2))] == [0, 1]
    maps = open_samples(room, "train")  # a set of maps is opened as before
    assert maps.targets == ["semseg", "depth", "normals"] and maps.labels is None and maps.image_classes == []
    (home / "data" / "pets" / "train" / "cat" / "b.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cat/b.png"):
        classified(open_images(str(pets), "train")).read(1)
    with pytest.raises(UserError, match=r"no split 'tran'. Near: 'train'"):
        open_samples(str(pets), "tran")


CAMERA = {"fx": 9.0, "fy": 9.0, "cx": 6.0, "cy": 4.0}  # in the middle of 9 x 13 pixels


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("maps", ["as stored", "with the tag of the image", "as shown"])
def test_the_exif_orientation_of_an_image_turns_its_maps(tmp_path, orientation, maps, suffix):
    """Pixel by pixel, whatever the maps' own tags are, and normals as the depth of the turned scene has them."""
    rng = np.random.default_rng(orientation)
    rows, columns = np.mgrid[:9, :13]
    planes = {
        "image": rng.integers(0, 256, (9, 13, 3), np.uint8),
        "label": rng.integers(0, 5, (9, 13), np.uint8),
        "depth_mm": (1e6 / (300 + 9 * columns - 5 * rows)).astype(np.uint16),
    }
    tag = Image.Exif()
    tag[274] = orientation
    shown, paths = {}, {}
    for name, values in planes.items():
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG", exif=tag)
        shown[name] = np.array(ImageOps.exif_transpose(Image.open(buffer)))
        paths[name] = tmp_path / f"{name}{suffix if name == 'image' else '.png'}"
        tagged = name == "image" or maps == "with the tag of the image"
        stored = shown[name] if name != "image" and maps == "as shown" else values
        Image.fromarray(stored).save(paths[name], **({"exif": tag} if tagged else {}))
    if maps == "as shown" and orientation in (2, 3, 4):
        return  # nothing tells these maps from stored ones
    sample = read_maps(paths, MapSettings(5))
    assert np.array_equal((sample["image"] * 255).round().byte().permute(1, 2, 0), shown["image"])
    assert np.array_equal(sample["semseg"], shown["label"])
    assert np.allclose(sample["depth"], shown["depth_mm"] / 1000)
    if maps == "as stored":
        camera = CAMERA if orientation < 5 else {**CAMERA, "cx": 4.0, "cy": 6.0}
        derived = read_maps(paths, MapSettings(5, camera=CAMERA))["normals"]
        assert torch.allclose(derived, normals_from_depth(sample["depth"], camera), atol=1e-5) and derived.any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_normals_are_turned_with_the_image(tmp_path, orientation):
    """A vector to the right of the stored image points where the right side of it is after turning, tag on the map or not."""
    tag = Image.Exif()
    tag[274] = orientation
    right = np.zeros((2, 3, 3), np.uint8)
    right[:] = (255, 128, 128)
    bright = np.zeros((2, 3), np.uint8)
    bright[:, 2] = 255  # the right side
    Image.fromarray(bright).save(tmp_path / "i.png", exif=tag)
    for own in ({}, {"exif": tag}):
        Image.fromarray(right).save(tmp_path / "n.png", **own)
        sample = read_maps({"image": tmp_path / "i.png", "normal": tmp_path / "n.png"}, MapSettings(2))
        side = sample["image"][0]
        x = side[:, -1].sum() - side[:, 0].sum()
        y = side[0].sum() - side[-1].sum()
        expected = torch.stack([x, y]) / torch.stack([x, y]).norm()
        assert torch.allclose(sample["normals"][:2, 0, 0], expected, atol=0.01)


def test_depth_of_8_bits_is_no_millimetres(room, home):
    """An 8-bit depth map is a picture of depth in a scale of its own, not a scene within 255 mm."""
    path = home / "data" / "d" / "train" / "depth" / "7.png"
    Image.fromarray(np.full((2, 3), 200, np.uint8)).save(path)
    with pytest.raises(
        UserError, match=r"depth/7.png: a depth map in depth_mm must be .* of 16 bits or more, is uint8"
    ):
        open_dense(room).read(0)
