"""The parts of a set of texts: within each class where rows have one, by users where they have those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.lm_parts import sentiment_task, tokenizer

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.data.division import divide
from vismt.jobs.lm.config import LmCalibrationConfig, LmConfig
from vismt.jobs.lm.data import LmData

ANSWERS = {"0": " negative", "1": " positive"}


def table(folder: Path, labels: str) -> str:
    """Write a table with a row of text for each label; return its path."""
    rows = [{"text": f"film {number}", "other": "bad", "label": label} for number, label in enumerate(labels)]
    path = folder / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(films: str, **changes: object) -> LmData:
    task = sentiment_task(films, **{"train": [films], "test": [], **changes})
    data = LmData(build(LmConfig, {"tasks": [task]}, "made"), tokenizer())
    data.names("sentiment", "train")
    return data


def labels(data: LmData, part: str) -> list[str]:
    (name,) = data.names("sentiment", part)
    return [row["label"] for texts in data._sets["sentiment"][part][name] for row in texts.rows]


SHARES = {"test_share": 0.25, "validation_share": 0.25}


@pytest.mark.parametrize(
    "changes",
    [{}, {"kind": "answers", "options": {"answers": ANSWERS, "label": "{label}"}}],
    ids=["classes", "answers"],
)
def test_a_table_sorted_by_label_is_divided_within_each_label(tmp_path: Path, changes: dict) -> None:
    data = opened(table(tmp_path, "0" * 12 + "1" * 8), **SHARES, **changes)
    assert {part: "".join(labels(data, part)) for part in ("train", "test", "validation")} == {
        "train": "0" * 6 + "1" * 4,
        "test": "000" + "11",
        "validation": "000" + "11",
    }
    assert [item.id for item in data.rows("sentiment", "test", *data.names("sentiment", "test"))][:2] == [
        "films:all:6",
        "films:all:7",
    ]


def test_what_rows_are_does_not_depend_on_what_is_asked_of_them(tmp_path: Path) -> None:
    def content(name: str, rows: str, **changes: object) -> str:
        (tmp_path / name).mkdir()
        data = opened(table(tmp_path / name, rows), **SHARES, **changes)
        return data.content("sentiment", "test", *data.names("sentiment", "test"))

    first = content("first", "0" * 12 + "1" * 8)
    assert content("again", "0" * 12 + "1" * 8, prompt="{text}. Good?") == first
    assert content("other", "0" * 12 + "1" * 7 + "0") != first


def test_choices_of_a_row_of_its_own_are_no_classes(tmp_path: Path) -> None:
    """Here the label is a place in the row's list: the last rows are the test, as of rows without labels."""
    options = {"answers": {"0": " {text}", "1": " {other}"}, "label": "{label}"}
    data = opened(table(tmp_path, "0" * 12 + "1" * 8), **SHARES, kind="answers", options=options)
    assert "".join(labels(data, "test")) == "00" + "111" and "".join(labels(data, "validation")) == "1" * 5


def test_rows_without_labels_are_divided_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = opened(table(tmp_path, "0" * 8), **SHARES, kind="causal", options={"answer": "{text}"}, prompt="")
    (name,) = data.names("sentiment", "test")
    assert data._sets["sentiment"]["test"][name][0].ids == ["all:4", "all:5"]


def test_a_class_with_too_few_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="class '1' has 2 examples, too few for 3 parts; add examples, or remove the class"
    ):
        opened(table(tmp_path, "0" * 12 + "11"), **SHARES)


@pytest.mark.parametrize(("rows", "noted"), [("1111", True), ("0111", False)])
def test_a_part_of_one_label_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture, rows: str, noted: bool) -> None:
    train = tmp_path / "train"
    train.mkdir()
    opened(table(train, "0011"), test=[table(tmp_path, rows)])
    text = "every row of test 'films' has the label '1'; scores say nothing of the others"
    assert (text in capsys.readouterr().out) == noted


def test_rows_of_two_training_sets_have_different_names(tmp_path: Path) -> None:
    """Records are kept by the name of a row: of two rows of one name only one would be scored."""
    films = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        films.append(table(tmp_path / folder, "01" * 6))
    with pytest.raises(UserError, match=r"rows of train 'films\+films' are called 'films:all:0', as two of its sets"):
        opened(films[0], train=films, test_share=0.25)
    with pytest.raises(UserError, match="are called 'films:all:0'"):
        opened(films[0], train=[films[0]] * 2, test_share=0.25)


def test_calibration_texts_without_a_token_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a film", "", "the plot")))
    data = opened(table(tmp_path, "01" * 4), test_share=0.25)
    with pytest.raises(UserError, match=r"calibration: text '\{text\}' gives rows without a token"):
        data.calibration(LmCalibrationConfig(data=[str(path)]))


def test_users_are_divided_as_before() -> None:
    """A share of the users and not of the rows: one function, over users in the order in which they come."""
    parts = divide(torch.zeros(10, dtype=torch.int64), {"test": 0.2, "validation": 0.1}, "walks")
    assert {part: index.tolist() for part, index in parts.items()} == {
        "train": [0, 1, 2, 3, 4, 5, 6],
        "test": [7, 8],
        "validation": [9],
    }


def test_rows_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = [{"text": "film " * n, "answer": "good " * m} for n, m in ((1, 1), (9, 1), (2, 1), (9, 9))]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in long))
    options = {"answer": " {answer}", "length": 8}
    data = opened(str(path), kind="causal", prompt="{text}", options=options)
    data.all_rows("train")
    message = (
        "2 of 4 rows of train 'films' lose the beginning of the prompt, 1 the end of the answer; length 8 cuts them"
    )
    assert message in capsys.readouterr().out
    options["length"] = 64
    opened(str(path), kind="causal", prompt="{text}", options=options).all_rows("train")
    assert "lose the beginning" not in capsys.readouterr().out


@pytest.mark.parametrize("shares", [{}, SHARES])
def test_an_error_of_a_row_names_the_row(tmp_path: Path, shares: dict[str, float]) -> None:
    path = tmp_path / "films.jsonl"
    rows = [{"text": f"film {n}", "label": str(n % 2)} for n in range(12)]
    del rows[7]["label"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 'films:all:7': tasks: label '\{label\}': no field 'label'"):
        opened(str(path), **shares).all_rows("train")
