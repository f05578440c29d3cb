"""The files that `vismt predict` takes, and the rows that it writes of classes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vismt.base.errors import UserError
from vismt.jobs.predictions import class_row, image_files, write_rows


def test_a_folder_stands_for_its_images(tmp_path: Path) -> None:
    names = ["b.png", "a.JPG", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.png").mkdir()
    (tmp_path / "empty").mkdir()
    found = image_files([tmp_path, Path("x.png")])
    assert [path.name for path in found] == ["a.JPG", "b.png", "x.png"]
    with pytest.raises(UserError, match=r"empty' has no image file \(.bmp, .gif"):
        image_files([tmp_path / "empty"])


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
