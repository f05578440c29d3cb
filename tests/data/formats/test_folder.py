"""Class folders: layouts, split lists, labels that mean the same in every split, and what is refused."""

from __future__ import annotations

import pytest

from vismt.base.errors import UserError
from vismt.data.images import open_images


def test_split_and_all(pets):
    train, everything = open_images(pets, "train"), open_images(pets)
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0, 0, 1]
    assert train.ids == ["train/cat/a.png", "train/cat/b.png", "train/dog/a.png"]
    assert everything.labels.tolist() == [0, 0, 1, 0, 1] and len(everything) == 5
    assert [int(everything.read(i)[0, 0, 0]) for i in range(5)] == [10, 20, 30, 40, 50]
    assert everything.read(0).shape == (3, 5, 6)


def test_a_class_absent_from_a_split_keeps_its_label(home, paint, write_card):
    for name in ["train/ant/1.png", "train/bee/1.png", "test/bee/1.png"]:
        paint(home / "data" / "b" / name)
    path = write_card('  - {kind: folder, root: b, layout: "{split}/{class}", splits: {train: 2, test: null}}')
    test = open_images(path, "test")
    # A reader that numbers the classes of each split on its own would say 0.
    assert test.classes == ["ant", "bee"] and test.labels.tolist() == [1]


def test_deep_layout_takes_the_bottom_folder(home, paint, write_card):
    for name in ["train/Fruit/Apple/Gala/1.png", "train/Fruit/Kiwi/1.png"]:
        paint(home / "data" / "g" / name)
    path = write_card('  - {kind: folder, root: g, layout: "{split}/**/{class}", splits: {train: 2}}')
    assert open_images(path, "train").classes == ["Gala", "Kiwi"]


def test_class_folders_of_one_name_are_not_joined(home, paint, write_card):
    for name in ("Greek/character01/1.png", "Latin/character01/1.png"):
        paint(home / "data" / "o" / name)
    path = write_card('  - {kind: folder, root: o, layout: "**/{class}", splits: {all: 2}}')
    with pytest.raises(
        UserError, match=r"'Greek/character01' and 'Latin/character01' under .* have the same name; rename"
    ):
        open_images(path)


def test_split_lists(home, paint, write_card):
    for name in ["a/1.png", "a/2.png", "b/1.png"]:
        paint(home / "data" / "l" / name)
    source = '  - {kind: folder, root: l, layout: "{class}", splits: {train: 2, test: 1}, lists: {train: t.txt, test: e.txt}}'
    path = write_card(source)
    (path.parent / "t.txt").write_text("# first\nb/1.png\n\na/1.png\n")
    with pytest.raises(UserError, match=r"missing split file 'e.txt'"):
        open_images(path, "test")
    (path.parent / "e.txt").write_text("a/3.png\n")
    with pytest.raises(UserError, match=r"0 of 1 images of split 'test' found under \$VISMT_DATA/l; missing 'a/3.png'"):
        open_images(path, "test")
    (path.parent / "e.txt").write_text("../l/a/2.png\n")
    with pytest.raises(UserError, match=r"without '\.\.'"):
        open_images(path, "test")
    train = open_images(path, "train")
    assert train.ids == ["b/1.png", "a/1.png"] and train.labels.tolist() == [1, 0]


def test_card_beside_its_images(home, paint, write_card):
    path = write_card('  - {kind: folder, root: ., layout: "{class}", splits: {all: null}}')
    paint(path.parent / "x" / "1.png")
    paint(path.parent / "y" / "1.png")
    assert open_images(path).classes == ["x", "y"]


def test_empty_class_folder_is_named(home, pets):
    (home / "data" / "pets" / "train" / "eel").mkdir()
    (home / "data" / "pets" / "train" / "eel" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"class folder '\$VISMT_DATA/pets/train/eel' holds no image; remove"):
        open_images(pets, "test")


def test_wrong_layout_gets_a_hint(pets, write_card):
    path = write_card('  - {kind: folder, root: pets, layout: "{class}", splits: {all: null}}')
    with pytest.raises(UserError, match=r"it holds folders: is the layout '\{split\}/\{class\}'"):
        open_images(path)


def test_short_copy_says_how_many(home, pets):
    (home / "data" / "pets" / "train" / "cat" / "b.png").unlink()
    with pytest.raises(
        UserError, match=r"pets: 2 of 3 images found under \$VISMT_DATA/pets \(split 'train'\).* See .*card.yaml"
    ):
        open_images(pets, "train")
    assert len(open_images(pets, "test")) == 2


def test_too_many_images_or_classes(home, paint, pets):
    paint(home / "data" / "pets" / "train" / "cow" / "1.png")
    with pytest.raises(UserError, match="4 of 3 images"):
        open_images(pets, "train")
    with pytest.raises(UserError, match="3 of 2 classes"):
        open_images(pets, "test")


def test_missing_split_folder_and_unknown_split(home, pets):
    with pytest.raises(UserError, match=r"no split 'tran'. Near: 'train'"):
        open_images(pets, "tran")
    (home / "data" / "pets" / "test").rename(home / "elsewhere")
    with pytest.raises(UserError, match="has no folder for split 'test'"):
        open_images(pets, "test")


def test_hidden_files_and_folders_are_not_images(home, paint, pets):
    paint(home / "data" / "pets" / "train" / ".cache" / "1.png")
    paint(home / "data" / "pets" / "train" / "cat" / "._a.png")
    assert len(open_images(pets, "train")) == 3
