"""Sets without a card, cards with the least, and folders of data in several places."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.own_images import Pictures, write_folder, write_table

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.images import open_images
from vismt.data.set_entries import card_and_split, check_row_names, overlap, row_name
from vismt.data.texts.text_set import open_texts


def same_as_pictures(images) -> bool:
    """Whether a set has the images and labels of `Pictures`."""
    wanted = [torch.from_numpy(np.array(image)).permute(2, 0, 1).long() for image, _ in Pictures().examples]
    return (
        tuple(images.classes) == Pictures.classes
        and images.labels.tolist() == [label for _, label in Pictures().examples]
        and all(torch.equal(images.read(i).long(), image) for i, image in enumerate(wanted))
    )


def test_a_folder_of_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my pictures")
    images = open_images(folder)
    assert same_as_pictures(images) and images.name == "my-pictures" and images.split == "all"
    assert check(folder).ok and "24 images" in str(check(folder))


def test_a_folder_of_splits(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 4, ("train", "val"))
    assert len(open_images(folder)) == 24 and len(open_images(folder, "val")) == 12
    assert not torch.equal(open_images(folder, "val").read(0), open_images(folder, "train").read(0))
    with pytest.raises(UserError, match=r"no split 'vall'\. Near: 'val'"):
        open_images(folder, "vall")


def test_classes_below_other_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "warm")
    images = open_images(tmp_path / "set")
    assert tuple(images.classes) == Pictures.classes and images.ids[0] == "warm/blue/00.png"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_of_images(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path / "pictures")
    assert same_as_pictures(open_images(write_table(tmp_path / "pictures", suffix=suffix)))
    table = write_table(tmp_path / "pictures", split=True)
    train, test = open_images(table, "train"), open_images(table, "test")
    assert len(train) == len(test) == 12 and not set(train.ids) & set(test.ids)
    assert set(train.ids) | set(test.ids) == set(open_images(table).ids)


def test_a_table_with_paths_from_the_root(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 2)
    table = folder / "t.csv"
    table.write_text(f"File,Class\n{folder}/red/00.png,10\n{folder}/blue/00.png,9\n")
    images = open_images(table)
    assert images.ids == ["red/00.png", "blue/00.png"] and images.classes == ["9", "10"]  # numbers in their order
    table.write_text(f"file,class\n{tmp_path}/other.png,a\n{folder}/blue/00.png,b\n")
    with pytest.raises(UserError, match=r"line 2: '.*other\.png' must be a relative path"):
        open_images(table)


def test_a_row_without_a_label_is_named_and_not_dropped(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 2)
    table = folder / "t.csv"
    for row, reason in (
        ("red/01.png", "has no 'label', as it has fewer"),
        ("red/01.png,", "'red/01.png' has no label"),
    ):
        table.write_text(f"path,label\nred/00.png,a\n{row}\nblue/00.png,b\n")
        with pytest.raises(UserError, match=f"t.csv: line 3: {reason}"):
            open_images(table)
    assert len(open_texts(table)) == 3


def test_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"good, very good",1\nbad,0\n')
    texts = open_texts(tmp_path / "a.csv")
    assert texts.rows == [{"text": "good, very good", "label": "1"}, {"text": "bad", "label": "0"}]
    (tmp_path / "a.jsonl").write_text('{"text": "good", "label": 1}\n')
    assert open_texts(tmp_path / "a.jsonl").rows == [{"text": "good", "label": 1}]
    (tmp_path / "a.csv").write_text("text,label\ngood, very good,1\n")
    with pytest.raises(UserError, match="line 2: does not have the 2 columns of the first line; put quotes around"):
        open_texts(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"is a set of texts \(kind text\)"):
        open_images(tmp_path / "a.csv")


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither card\.yaml nor class folders in it; give a folder with a folder of"):
        open_images(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt': this is not a \.csv, .*\.json, .* file; write its rows into one\."):
        open_images(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"a\.csv': has no rows; write the names of the columns, then a line for each"):
        open_images(tmp_path / "a.csv")
    (tmp_path / "set" / "empty").mkdir(parents=True)
    write_folder(tmp_path / "set" / "more", 1)
    with pytest.raises(UserError, match=r"holds no image.*remove the folder"):
        open_images(tmp_path / "set")


def test_the_least_card_with_an_absolute_root(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "far" / "pictures")
    card = tmp_path / "mine" / "card.yaml"
    card.parent.mkdir()
    card.write_text(f"name: mine\nsources: [{{kind: folder, root: {folder}}}]\n")
    images = open_images(card)
    assert same_as_pictures(images) and images.name == "mine"
    card.write_text("name: mine\nsources: [{kind: folder, root: ../far/pictures}]\n")
    with pytest.raises(UserError, match=r"root: '\.\./far/pictures' must be a relative path"):
        open_images(card)


@pytest.mark.parametrize("name", ["x" * 300, f"../{'x' * 300}", f"{'x' * 300}:train"])
def test_names_longer_than_a_file_may_have(name: str) -> None:
    for door in (open_images, open_texts):
        with pytest.raises(UserError, match=f"data '{name[:190]}.*': no "):
            door(name)
    assert row_name(name).rpartition("/")[2] == name.rpartition("/")[2] and not overlap(name, "digits")


def test_several_folders_of_data(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path / "two" / "pictures")
    (tmp_path / "one").mkdir()
    card = tmp_path / "card.yaml"
    card.write_text("name: mine\nsources: [{kind: folder, root: pictures}]\n")
    monkeypatch.setenv("VISMT_DATA", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    images = open_images(card)
    assert same_as_pictures(images) and images.where == "$VISMT_DATA/pictures"
    write_folder(tmp_path / "one" / "pictures", 1)
    assert len(open_images(card)) == 3  # the first folder wins
    monkeypatch.setenv("VISMT_DATA", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "gone")]))
    with pytest.raises(UserError, match=r"VISMT_DATA: '.*gone' is not a folder"):
        open_images(card)


def test_names_in_results(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 1)
    card = tmp_path / "card.yaml"
    card.write_text(f"name: mine\nsources: [{{kind: folder, root: {folder}}}]\n")
    rows = {"digits": "digits", "md_cub:test": "md_cub:test", f"{card}:all": "mine", str(tmp_path): "mine"}
    rows |= {str(folder): "pictures", f"{folder}:train": "pictures:train", "gone/set": "set", "gone/mine.yaml": "mine"}
    assert {name: row_name(name) for name in rows} == rows
    assert card_and_split(f"{folder}:train") == (str(folder), "train") and card_and_split(str(folder))[1] == "all"
    assert overlap(str(folder), f"{folder}:train") and not overlap("digits:train", "digits:test")
    with pytest.raises(UserError, match="'a/x' and 'b/x' are both called 'x' in results; rename one"):
        check_row_names(["a/x", "b/x"], "evaluate.data")
    with pytest.raises(UserError, match="'mine:test' and 'mine-test' are both called 'mine-test' in results"):
        check_row_names(["mine:test", "mine-test"], "evaluate.data")  # in the names of files
