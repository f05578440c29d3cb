"""Lists by image id: split, label and path of every id, and a line for each way in which the lists can be wrong."""

from __future__ import annotations

import pytest

from vismt.base.errors import UserError
from vismt.data.cards import load_card
from vismt.data.check import check
from vismt.data.images import open_images

CLASSES = ["001.Albatross", "002.Ani", "003.Auklet"]
# id: path, class, training. Ids are neither in order nor those of the classes, and class 3 comes before class 2.
BIRDS = {
    "4": ("001.Albatross/a.png", 1, 1), "2": ("001.Albatross/b.png", 1, 0), "7": ("003.Auklet/a.png", 3, 1),
    "5": ("003.Auklet/b c.png", 3, 0), "9": ("002.Ani/a.png", 2, 1),
}  # fmt: skip


def write(base, name, lines):
    (base / name).write_text("\n".join(lines) + "\n")


@pytest.fixture
def birds(home, paint, write_card):
    base = home / "data" / "birds"
    for value, (path, _, _) in enumerate(BIRDS.values()):
        paint(base / "images" / path, 10 * (value + 1))
    write(base, "paths.txt", [f"{key} {path}" for key, (path, _, _) in BIRDS.items()])
    # The other lists have the ids in another order: rows may not be paired by their place.
    write(base, "labels.txt", [f"{key} {label}" for key, (_, label, _) in sorted(BIRDS.items())])
    write(base, "training.txt", [f"{key} {mark}" for key, (_, _, mark) in sorted(BIRDS.items(), reverse=True)])
    write(base, "names.txt", [f"{k} {name}" for k, name in enumerate(CLASSES, start=1)])
    source = (
        "  - {kind: lists, root: birds, folder: images, paths: paths.txt, labels: labels.txt, training: training.txt,"
        " names: names.txt, splits: {train: 3, test: 2}}"
    )
    return write_card(source, name="birds", classes=3), base


def test_splits_labels_and_images(birds):
    card, _ = birds
    train, test = open_images(card, "train"), open_images(card, "test")
    assert train.classes == test.classes == CLASSES
    assert train.ids == ["images/001.Albatross/a.png", "images/003.Auklet/a.png", "images/002.Ani/a.png"]
    assert train.labels.tolist() == [0, 2, 1] and [int(train.read(i)[0, 0, 0]) for i in range(3)] == [10, 30, 50]
    assert test.ids == ["images/001.Albatross/b.png", "images/003.Auklet/b c.png"] and test.labels.tolist() == [0, 2]
    assert open_images(card).ids == train.ids + test.ids
    report = check(card)
    assert report.ok and [row.actual for row in report.splits] == [3, 2]
    assert set(load_card(card).sources[0].list_files(birds[1])) == {
        "paths.txt",
        "labels.txt",
        "training.txt",
        "names.txt",
    }


@pytest.mark.parametrize("name", ["paths.txt", "labels.txt", "training.txt", "names.txt"])
def test_a_missing_list_is_named(birds, name):
    card, base = birds
    (base / name).unlink()
    with pytest.raises(
        UserError, match=rf"missing list '\$VISMT_DATA/birds/{name}'. See .*card.yaml for how to get it"
    ):
        open_images(card, "train")
    assert not check(card).ok


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/secret.png", "001.Albatross/../../secret.png", "C:/secret.png"]
)
def test_a_path_that_leaves_the_folder_is_refused(birds, paint, path):
    card, base = birds
    paint(base / "secret.png")
    text = (base / "paths.txt").read_text()
    (base / "paths.txt").write_text(text.replace("001.Albatross/a.png", path))
    with pytest.raises(UserError, match=r"paths.txt: '.*secret.png' must be a relative path") as caught:
        open_images(card, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "labels.txt",
            "7 3\n",
            "",
            r"1 of the 5 ids of '\$VISMT_DATA/birds/paths.txt' are not in 'labels.txt', .* '7'",
        ),
        (
            "labels.txt",
            "7 3\n",
            "7 3\n8 3\n",
            r"1 of the 6 ids of '.*labels.txt' are not in 'paths.txt', the first is '8'",
        ),
        ("training.txt", "9 1\n", "09 1\n", "ids of '.*paths.txt' are not in 'training.txt', the first is '9'"),
        ("paths.txt", "9 002.Ani/a.png\n", "", "ids of '.*labels.txt' are not in 'paths.txt', the first is '9'"),
        ("labels.txt", "7 3", "7 4", "labels.txt: id '7' has '4', which is not a class of 'names.txt'"),
        ("training.txt", "9 1", "9 2", r"training.txt: id '9' has '2', which is neither 1 \(train\) nor 0 \(test\)"),
        ("training.txt", "9 1", "9 0", r"2 of 3 images found under \$VISMT_DATA/birds \(split 'train'\)"),
        ("names.txt", "3 003.Auklet\n", "3 003.Auklet\n4 004.Bunting\n", "4 of 3 classes found"),
        ("labels.txt", "7 3", "7", "line 4: '7' must be an id, a space and a value"),
        ("labels.txt", "7 3", "7 3\n7 2", "line 5: id '7' is given twice"),
    ],
)
def test_lists_that_disagree_are_one_line(birds, name, old, new, message):
    card, base = birds
    text = (base / name).read_text()
    assert old in text
    (base / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        open_images(card, "train")
    assert "\n" not in str(caught.value)


def test_a_list_that_is_no_text(birds):
    card, base = birds
    (base / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"list '\$VISMT_DATA/birds/labels.txt' cannot be read"):
        open_images(card, "train")
