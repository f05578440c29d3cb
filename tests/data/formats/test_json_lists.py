"""The lists of cross-domain few-shot learning: labels of one numbering, absolute names cut, names that lead outside refused."""

from __future__ import annotations

import json

import pytest

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.formats.json_lists import local_name
from vismt.data.images import open_images

BIRDS = ["001.Albatross", "002.Ani", "003.Auklet", "004.Bunting"]
WRITTEN = "/home/someone/CrossDomainFewShot/filelists/birds/source"


def write_list(base, split, labels, names=None, classes=BIRDS):
    names = names or [f"{WRITTEN}/{classes[k]}/{i}.png" for i, k in enumerate(labels)]
    (base / f"{split}.json").write_text(
        json.dumps({"label_names": classes, "image_names": names, "image_labels": labels})
    )


@pytest.fixture
def birds(home, paint, write_card):
    base = home / "data" / "filelists" / "birds"
    base.mkdir(parents=True)
    for split, labels in (("base", [0, 0, 2]), ("val", [1, 1]), ("novel", [3, 3, 3])):
        write_list(base, split, labels)
        for i, k in enumerate(labels):
            paint(base / "source" / BIRDS[k] / f"{i}.png", 10 * k + i)
    source = (
        "  - {kind: filelist, root: filelists/birds, after: filelists/birds/, classes_per_split: {base: 2, val: 1, novel: 1},"
        " splits: {base: 3, val: null, novel: 3}}"
    )
    return write_card(source, name="birds", classes=4), base


def test_labels_are_those_of_label_names_in_every_split(birds):
    card, _ = birds
    novel = open_images(card, "novel")
    assert novel.classes == BIRDS and novel.labels.tolist() == [3, 3, 3]
    assert novel.ids[0] == "source/004.Bunting/0.png" and [int(novel.read(i)[0, 0, 0]) for i in range(3)] == [
        30,
        31,
        32,
    ]
    assert open_images(card, "base").labels.tolist() == [0, 0, 2] and len(open_images(card)) == 8
    report = check(card)
    assert report.ok and report.images == 8


def test_one_list_is_enough_for_its_split(birds):
    card, base = birds
    (base / "base.json").unlink()
    assert open_images(card, "novel").labels.tolist() == [3, 3, 3]
    with pytest.raises(UserError, match=r"missing list '\$VISMT_DATA/filelists/birds/base.json'"):
        open_images(card, "base")


def test_names_relative_to_the_folder(birds):
    card, base = birds
    write_list(base, "novel", [3, 3, 3], [f"source/004.Bunting/{i}.png" for i in range(3)])
    assert open_images(card, "novel").ids[2] == "source/004.Bunting/2.png"


def test_local_name_cuts_at_the_first_marker():
    assert local_name("/a/filelists/cub/source/x.jpg", "filelists/cub/", "l") == "source/x.jpg"
    with pytest.raises(UserError, match="what follows 'filelists/cub/' counts"):
        local_name("/a/myfilelists/cub/x.jpg", "filelists/cub/", "l")
    with pytest.raises(UserError, match="is outside the folder"):
        local_name("/a/x.jpg", None, "l")


@pytest.mark.parametrize(
    ("labels", "names", "classes", "message"),
    [
        ([3, 3, 3], None, [*BIRDS, "005.Cardinal"], "5 of 4 classes"),
        ([3, 7], ["a.png", "b.png"], BIRDS, "labels run from 3 to 7, but label_names has 4"),
        ([3, 1.9], ["a.png", "b.png"], BIRDS, "novel.json: label 1.9; a label must be a whole number"),
        ([3, True], ["a.png", "b.png"], BIRDS, "novel.json: label True; a label must"),
        ([3, "3"], ["a.png", "b.png"], BIRDS, "novel.json: label '3'; a label must"),
        ([3, 3], ["a.png"], BIRDS, "1 images, 2 labels"),
        ([3], None, ["x", "x", "y", "z"], "no class twice"),
        ([3, 2], None, BIRDS, "split 'novel' has 2 of 1 classes"),
        (
            [3, 3, 3],
            ["source/004.Bunting/0.png", "a.png", "b.png"],
            BIRDS,
            r"1 of 3 images of split 'novel' .*missing 'a.png'",
        ),
        ([3], ["source/004.Bunting/0.png"], BIRDS, r"1 of 3 images found .*split 'novel'"),
        # Names that lead outside of the folder.
        ([3], ["../secret.png"], BIRDS, "novel.json: '.*secret.png'"),
        ([3], ["/etc/secret.png"], BIRDS, "novel.json: '.*secret.png'"),
        ([3], [f"{WRITTEN}/../../../secret.png"], BIRDS, "novel.json: '.*secret.png'"),
        ([3], ["source/../../secret.png"], BIRDS, "novel.json: '.*secret.png'"),
        ([3], ["/filelists/other/x.png"], BIRDS, "novel.json: '/filelists/other"),
    ],
)
def test_a_bad_list_is_one_line(birds, labels, names, classes, message):
    card, base = birds
    write_list(base, "novel", labels, names, classes)
    with pytest.raises(UserError, match=message) as caught:
        open_images(card, "novel")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"label_names": []}'])
def test_a_list_of_another_shape(birds, text):
    card, base = birds
    (base / "novel.json").write_text(text)
    with pytest.raises(
        UserError, match=r"novel.json: must be JSON with the lists label_names, image_names, image_labels"
    ):
        open_images(card, "novel")
