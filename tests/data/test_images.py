"""open_images: which source is taken, readable names, superclasses, damaged images."""

from __future__ import annotations

import json

import pytest

from vismt.base.errors import UserError
from vismt.data.images import open_images


def break_file(home, name: str) -> None:
    (home / "data" / "pets" / name).write_bytes(b"\x89PNG broken")


def test_skip_leaves_it_out_counts_and_reports_it(home, pets, capsys):
    whole = open_images(pets, "train").content()
    break_file(home, "train/cat/b.png")
    images = open_images(pets, "train", on_bad_sample="skip")
    assert images.skipped == ["train/cat/b.png"] and images.ids == ["train/cat/a.png", "train/dog/a.png"]
    # The reader must follow: index 1 is now the dog (30), not the damaged file.
    assert images.labels.tolist() == [0, 1] and int(images.read(1)[0, 0, 0]) == 30
    assert images.content() != whole
    assert "1 of 3 images skipped, they cannot be decoded: train/cat/b.png" in capsys.readouterr().out


def test_skip_with_nothing_damaged(pets):
    assert open_images(pets, on_bad_sample="skip").skipped == []


def test_skip_that_empties_a_class(home, pets):
    break_file(home, "train/dog/a.png")
    with pytest.raises(UserError, match="no image of class 'dog' can be decoded"):
        open_images(pets, "train", on_bad_sample="skip")


def test_unknown_policy(pets):
    with pytest.raises(UserError, match=r"on_bad_sample is 'ignore'.*'error', 'skip'"):
        open_images(pets, on_bad_sample="ignore")  # type: ignore[arg-type]


def test_names_and_superclasses(pets):
    pets.write_text(pets.read_text() + "names: names.json\nsuperclasses: super.json\n")
    (pets.parent / "names.json").write_text(json.dumps({"cat": "Felis catus"}))
    (pets.parent / "super.json").write_text(json.dumps({"cat": "small", "dog": "large"}))
    images = open_images(pets)
    assert images.classes == ["Felis catus", "dog"]
    assert images.superclass.tolist() == [1, 0] and images.superclass_names == ["large", "small"]
    (pets.parent / "super.json").write_text(json.dumps({"cat": "small"}))
    with pytest.raises(UserError, match=r"class 'dog' has no superclass in 'super.json'"):
        open_images(pets)
    (pets.parent / "names.json").write_text(json.dumps(["only one"]))
    (pets.parent / "super.json").write_text(json.dumps({"cat": "a", "dog": "b"}))
    with pytest.raises(UserError, match="list 2 names"):
        open_images(pets)


def test_absent_set_says_where_it_looked_and_how_to_get_it(home, monkeypatch):
    with pytest.raises(UserError) as caught:
        open_images("cifar100")
    assert str(caught.value) == (
        "datasets/cifar100: nothing found under $VISMT_CACHE/torchvision/cifar100."
        " `vismt data prepare cifar100` downloads it, or see datasets/cifar100/card.yaml."
    )
    monkeypatch.setenv("VISMT_DATA", str(home / "nowhere"))
    with pytest.raises(UserError, match=r"VISMT_DATA: .* is not a folder"):
        open_images("cifar100")


def test_content_follows_the_bytes_and_the_names(home, paint, pets):
    before = open_images(pets, "train").content()
    assert open_images(pets, "train").content() == before
    paint(home / "data" / "pets" / "train" / "cat" / "a.png", 11)
    changed = open_images(pets, "train").content()
    assert changed != before
    folder = home / "data" / "pets" / "train" / "cat"
    (folder / "a.png").rename(folder / "c.png")
    assert open_images(pets, "train").content() not in (before, changed)


def test_folder_that_cannot_be_read(pets, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UserError, match=r"folder '.*pets' cannot be read: Permission denied"):
        open_images(pets)
