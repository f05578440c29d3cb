"""npz sets: split arrays, packed bits, and files that are not what they say."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from vismt.base.errors import UserError
from vismt.data.images import open_images

SPLITS = "  - {kind: arrays, root: n, file: n.npz, splits: {train: 2, test: 1}}"
ALL = "  - {kind: arrays, root: n, file: n.npz, splits: {all: 2}%s}"


@pytest.fixture
def store(home):
    def write(**arrays):
        (home / "data" / "n").mkdir(exist_ok=True)
        np.savez(home / "data" / "n" / "n.npz", **arrays)

    return write


GREY = {"x_train": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "y_train": np.array([1, 0])}
TEST = {"x_test": np.full((1, 2, 3), 9, np.uint8), "y_test": np.array([1])}


def test_splits(store, write_card):
    store(**GREY, **TEST, classes=np.array(["a", "b"]))
    images = open_images(write_card(SPLITS))
    assert images.labels.tolist() == [1, 0, 1] and images.classes == ["a", "b"]
    assert images.ids == ["train/000000", "train/000001", "test/000000"]
    assert images.read(1).shape == (3, 2, 3) and images.read(1)[2].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_colour(store, write_card):
    store(x=np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), y=np.array([0, 1]))
    assert open_images(write_card(ALL % "")).read(0)[:, 0, 1].tolist() == [3, 4, 5]


def test_packed_bits(store, write_card):
    # 3 x 3 = 9 bits need 2 bytes: 0b10000000 and 0b1....... -> the first and the last pixel are ink.
    store(x_packed=np.array([[128, 128], [0, 0]], np.uint8), shape=np.array([2, 3, 3]), y=np.array([0, 1]))
    image = open_images(write_card(ALL % "")).read(0)[0]
    assert image.tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 255]]
    assert open_images(write_card(ALL % ", invert: true", name="dark")).read(0)[0].tolist() == (255 - image).tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**GREY}, "no array 'x_test'"),
        ({**GREY, **TEST, "y_test": np.array([2])}, "'y_test' runs from 2 to 2, but there are 2 classes"),
        (
            {**GREY, **TEST, "y_test": np.array([0, 1])},
            r"'y_test' is int64 \(2,\), must be whole numbers of shape \(1,\)",
        ),
        ({**GREY, **TEST, "x_test": np.zeros((1, 2, 2))}, "'x_test' is float64"),
        ({**GREY, **TEST, "y_test": np.array([0], dtype=object)}, "cannot be read as npz: Object arrays"),
        ({**GREY, **TEST, "x_train": GREY["x_train"][:1], "y_train": np.array([0])}, "1 of 2 images found"),
        ({**GREY, **TEST, "classes": np.array(["a", "b", "c"])}, "3 of 2 classes"),
    ],
)
def test_bad_arrays(store, write_card, arrays, message):
    store(**arrays)
    with pytest.raises(UserError, match=message):
        open_images(write_card(SPLITS))


def test_packed_rows_of_another_width(store, write_card):
    store(x_packed=np.zeros((2, 3), np.uint8), shape=np.array([2, 3, 3]), y=np.array([0, 1]))
    with pytest.raises(UserError, match="does not hold images of shape"):
        open_images(write_card(ALL % ""))


def test_cut_and_absent_file(home, write_card):
    path = home / "data" / "n" / "n.npz"
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"\$VISMT_DATA/n/n.npz: cannot be read as npz"):
        open_images(write_card(SPLITS))
    path.rename(path.with_name("other.npz"))
    with pytest.raises(UserError, match=r"no file '\$VISMT_DATA/n/n.npz'"):
        open_images(write_card(SPLITS))


def test_a_size_below_zero_is_refused_before_anything_is_read(home, write_card):
    (home / "data" / "n").mkdir()
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (-2, 3)})
    with zipfile.ZipFile(home / "data" / "n" / "n.npz", "w") as file:
        file.writestr("x_train.npy", array.getvalue() + bytes(100))
    with pytest.raises(UserError, match=r"an array of shape \(-2, 3\) has -6 bytes"):
        open_images(write_card(SPLITS))
