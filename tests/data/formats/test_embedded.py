"""Sets inside pip packages: digits and photograph crops."""

from __future__ import annotations

import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vismt.base.errors import UserError
from vismt.data import source_types
from vismt.data.cards import load_card
from vismt.data.check import check
from vismt.data.formats.embedded import crop_boxes
from vismt.data.images import open_images
from vismt.data.texts.text_set import open_texts


def test_digits():
    digits = open_images("digits")
    assert len(digits) == 1797 and digits.classes == list("0123456789")
    # Published class counts of this set.
    assert torch.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = digits.read(0)
    assert first.shape == (3, 8, 8) and first.dtype == torch.uint8
    # The first row of the first digit is 0 0 5 13 9 1 0 0: 5 * 255 / 16 = 79.7 -> 80, 13 -> 207.2, 9 -> 143.4, 1 -> 15.9.
    assert first[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_crop_box_by_hand():
    # 60 high, 100 wide: the halves are 60 x 50. Step 1: u = .5 + .81917 - 1 = .31917, v = .5 + .67104 - 1 = .17104,
    # s = .5 + .54970 - 1 = .04970; side = round(50 * (.45 + .4 * .0497)) = round(23.494) = 23;
    # top = int(.31917 * 38) = 12, left = int(.17104 * 28) = 4.
    assert crop_boxes(60, 100, "train", 1) == [(12, 4, 23)]


@given(st.integers(8, 400), st.integers(8, 400), st.integers(1, 60))
def test_halves_share_no_pixel(height, width, count):
    axis, middle = (0, height / 2) if height > width else (1, width / 2)
    for half in ("train", "test"):
        for box in crop_boxes(height, width, half, count):
            top, left, side = box
            assert top >= 0 and left >= 0 and top + side <= height and left + side <= width
            if half == "train":
                assert box[axis] + side <= middle
            else:
                assert box[axis] >= middle


def test_photo_crops_sets():
    train, test = open_images("photo_crops", "train"), open_images("photo_crops", "test")
    assert len(train) == len(test) == 720 and len(train.classes) == 18 and train.classes == test.classes
    assert torch.bincount(train.labels).tolist() == [40] * 18
    assert train.ids[41] == "train/brick/001" and test.ids[0] == "test/astronaut/000"
    crop = train.read(0)
    assert crop.shape[0] == 3 and crop.shape[1] == crop.shape[2] and 0.45 * 256 <= crop.shape[1] <= 0.85 * 256
    again = open_images("photo_crops", "train")
    assert torch.equal(again.read(700), train.read(700))
    assert len({tuple(box) for box in crop_boxes(300, 451, "train", 40)}) == 40


@pytest.mark.parametrize(("source", "message"), [
    ("kind: digits, splits: {train: null}", "digits has no split 'train'. Known: 'all'"),
    ("kind: python_topics, splits: {dev: null}", "python_topics has no split 'dev'. Known: 'test', 'train'"),
    ("kind: photo_crops, photographs: {a: a.png}, crops_per_half: 1", "photo_crops has no split 'all'. Known: 'test', 'train'"),
])  # fmt: skip
def test_splits_are_those_of_the_set(tmp_path, source, message):
    (tmp_path / "card.yaml").write_text(f"name: mine\nsources: [{{{source}}}]\n")
    with pytest.raises(UserError, match=message):
        load_card(tmp_path)


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(source_types, "package_folder", lambda module: None)
    fix = r'photo_crops: needs scikit-image, which is not installed: pip install "vismt\[quickstart\]"'
    with pytest.raises(UserError, match=fix):
        open_images("photo_crops")


def test_opening_photographs_downloads_and_imports_nothing():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from vismt.data.images import open_images\n"
        "import vismt.data.check, vismt.data.pixels, vismt.data.transforms, vismt.data.maps.dense_set\n"
        "heavy = {'skimage', 'sklearn', 'learn2learn', 'torchattacks', 'transformers', 'matplotlib', 'onnx'}\n"
        "assert not heavy & set(sys.modules)\n"
        "s = open_images('photo_crops', 'test')\n"
        "s.read(0); assert 'skimage' not in sys.modules and 'pooch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_topics_of_the_python_reference():
    train, test = open_texts("python_topics", "train"), open_texts("python_topics", "test")
    assert len(test) == len(topics) // 4 and len(train) + len(test) == len(topics)
    rows = train.rows + test.rows
    assert {row["topic"]: row["text"] for row in rows} == {name: text.strip() for name, text in topics.items()}
    assert sorted(train.ids + test.ids) == sorted(open_texts("python_topics").ids)
    assert [row["topic"] for row in test.rows] == sorted(topics)[3::4]
    assert train.content() != test.content() and check("python_topics").ok
