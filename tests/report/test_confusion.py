"""Accuracy by class and confusions, from counts that a job leaves in the run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vismt.base.errors import UserError
from vismt.report import confusion
from vismt.report.confusion import CLASSES_FOLDER, MOST_IN_MATRIX, class_section, write_confusion

COUNTS = np.array([[8, 1, 1], [0, 10, 0], [5, 0, 5]])


def test_classes_have_their_accuracy_and_a_matrix(tmp_path: Path, drawn: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusion, "save_figure", lambda figure, path: drawn.append(figure) or path)
    names = ["cat", "dog", "a/cow"]
    write_confusion(tmp_path, "my images", names, names, {"head": COUNTS, "lora": COUNTS[::-1, ::-1]})
    section = class_section(tmp_path, "lora")
    ((table, note),) = section.tables
    assert table.heads == ["Class", "lora", "head", "answers"] and "Wilson" in note
    # the class with the fewest right answers of the first model comes first
    assert [row[0] for row in table.rows] == ["cat", "a/cow", "dog"] and table.rows[0][3] == "10"
    assert table.rows[2][2] == "100.0 [72.2, 100.0]" and table.rows[1][2].startswith("50.0 ")
    assert [picture.title for picture in section.pictures] == [
        "my images, answers of lora",
        "my images, answers of head",
    ]
    axes = drawn[1].axes[0]
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "80", (0, 1): "10", (0, 2): "10", (1, 1): "100", (2, 0): "50", (2, 2): "50"}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names


def test_over_several_seeds_the_interval_counts_an_example_once(tmp_path: Path) -> None:
    write_confusion(tmp_path, "a", ["x", "y", "z"], ["x", "y", "z"], {"one": COUNTS, "three seeds": 3 * COUNTS})
    table = class_section(tmp_path, "").tables[0][0]
    assert all(row[1] == row[2] for row in table.rows)


def test_of_many_classes_the_most_frequent_confusions_are_listed(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(MOST_IN_MATRIX + 1)]
    counts = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    np.fill_diagonal(counts, 8)
    counts[3, 7], counts[5, -1] = 2, 12
    other = np.zeros_like(counts)
    other[3, 7] = other[3, 3] = 1
    write_confusion(tmp_path, "birds", names, [*names, "another task"], {"lora": counts, "head": other})
    section = class_section(tmp_path, "lora")
    (_, (table, _)) = section.tables
    assert not section.pictures
    assert table.rows == [["class 5", "another task", "60.0", "0.0"], ["class 3", "class 7", "20.0", "50.0"]]


def test_a_damaged_file_is_one_message_and_none_is_no_section(tmp_path: Path) -> None:
    assert not class_section(tmp_path, "lora").filled
    (tmp_path / CLASSES_FOLDER).mkdir()
    (tmp_path / CLASSES_FOLDER / "x.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is not a panel"):
        class_section(tmp_path, "lora")
