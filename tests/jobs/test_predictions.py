"""The files that `vismt predict` takes, and the rows that it writes of classes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vismt.base.errors import UserError
from vismt.jobs.predictions import class_row, image_files, write_rows


def test_a_folder_stands_for_the_images_in_and_below_it_and_others_are_counted(tmp_path: Path) -> None:
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        "sub/deep/c.png",
        ".hidden.png",
        "__MACOSX/d.png",
        "sub/e.csv",
        "to/f.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    (tmp_path / "empty").mkdir()
    found = image_files([tmp_path, Path("x.png")], tmp_path / "to")
    assert [str(place) for place in found.places.values()] == ["a.JPG", "b.png", "gone.png", "sub/deep/c.png", "x.png"]
    assert sorted(found.left_out.values()) == [1, 2, 3]  # written, hidden, of other names
    with pytest.raises(UserError, match=r"empty' has no image file \(.bmp, .gif"):
        image_files([tmp_path / "empty"], tmp_path / "to")


def test_rows_name_the_likeliest_classes_and_the_set(tmp_path: Path) -> None:
    """-log p of 0.5, 0.3, 0.2 is 0.69, 1.20, 1.61: a threshold of 1.5 takes two classes, one of 0.5 none."""
    log_p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    names = ["oak", "elm, field", "ash"]
    rows = [class_row(tmp_path / "a.png", "trees", log_p, names, quantile) for quantile in (1.5, 0.5)]
    rows.append(class_row(tmp_path / "b.png", "sky", log_p[:2].exp().div(0.7).log(), ["clear", "grey"], None))
    with write_rows(rows, tmp_path).open(newline="") as file:
        first, empty, short = csv.DictReader(file)
    assert [first[f"label{ending}"] for ending in ("", "_2", "_3")] == ["elm, field", "ash", "oak"]
    assert [float(first[f"probability{ending}"]) for ending in ("", "_2", "_3")] == pytest.approx([0.5, 0.3, 0.2])
    assert json.loads(first["set"]) == ["elm, field", "ash"] and json.loads(empty["set"]) == []
    assert short["task"] == "sky" and short["label"] == "grey" and short["label_3"] == short["set"] == ""
