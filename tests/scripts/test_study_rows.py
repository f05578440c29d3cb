"""Rows of a study: what is taken from a run folder, and what a file of rows must not be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.results import HASH, add, measure
from helpers.run_folder import make_folder

from scripts.study_rows import StudyRow, StudyRows, read_study, studies, study_of, write_study
from vismt.base.errors import UserError
from vismt.storage.files import sealed
from vismt.storage.lines import read_lines, write_lines
from vismt.storage.locks import locked
from vismt.uncertainty.intervals import CLEAN, Score


def number(study: StudyRows, **wanted: object) -> StudyRow:
    """Return the row of a study that has some values."""
    wanted = {"condition": "clean", "minus": "", **wanted}
    (row,) = (row for row in study.rows if all(getattr(row, key) == value for key, value in wanted.items()))
    return row


def changed(folder: Path, **values: object) -> None:
    """Replace entries of run.json; None removes one."""
    facts = {**json.loads((folder / "run.json").read_text()), **values}
    (folder / "run.json").write_text(sealed({key: facts[key] for key in facts if facts[key] is not None}))


def test_a_study_has_the_rows_their_averages_and_differences(tmp_path: Path) -> None:
    study = study_of(make_folder(tmp_path))
    assert study.about.config_hash == HASH and study.about.differences == [("adapted", "frozen")]
    assert study.about.settings["seed"] == 0 and study.about.versions["torch"] == "2.13.0"
    digits, crops, mean = (number(study, data=data, arm="adapted") for data in ("digits", "crops", "average"))
    assert (digits.value, mean.value) == pytest.approx((0.6, (0.6 + crops.value) / 2)) and mean.n == digits.n + crops.n
    difference = number(study, data="digits", arm="adapted", minus="frozen")  # 0.1 in each episode
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    crops_difference = number(study, data="crops", arm="adapted", minus="frozen")
    both = number(study, data="average", arm="adapted", minus="frozen")
    assert both.value == pytest.approx((0.1 + crops_difference.value) / 2) and both.half < crops_difference.half
    assert len(study.rows) == 8 + 4 + 6


def test_an_average_counts_the_units_of_all_its_sets(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    groups = {"0": "a", "1": "a", "2": "b", "3": "c"}
    for data, of in {"digits": {"groups": groups, "grouped_by": "signs"}, "crops": {}}.items():
        add(folder, Score("kinds", data, "test images", measure([0.1, 0.2, 0.6, 0.9], **of), CLEAN, "images"), "frozen")
    study = study_of(folder)
    texts = {
        data: number(study, data=data, arm="frozen", task="kinds").units for data in ("digits", "crops", "average")
    }
    assert texts == {"digits": "3 signs", "crops": "", "average": "7 groups"}


def test_trainings_of_a_difference_are_paired_by_seed_and_of_an_average_are_means_over_sets(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, seeds=[0, 1])
    values = {"frozen": {0: (0.2, 0.4), 1: (0.4, 0.6)}, "adapted": {0: (0.3, 0.9), 1: (0.8, 0.6)}}
    for arm, by_seed in values.items():
        for seed, scores in by_seed.items():
            for data, score in zip(("digits", "crops"), scores, strict=True):
                spread = measure([score - 0.1, score + 0.1])
                add(folder, Score("few-shot", data, "5-way 1-shot", spread, CLEAN, "episodes"), arm, seed=seed)
    study = study_of(folder)
    assert study.trainings(number(study, data="crops", arm="adapted")) == pytest.approx({0: 0.9, 1: 0.6})
    assert study.trainings(number(study, data="average", arm="adapted")) == pytest.approx({0: 0.6, 1: 0.7})
    difference = number(study, data="average", arm="adapted", minus="frozen")
    assert study.trainings(difference) == pytest.approx({0: 0.3, 1: 0.2})
    assert difference.interval == "examples+seeds"
    rows = [replace(row, by_seed=()) if row.arm == "frozen" else row for row in study.rows]  # which is not trained
    by_seed = replace(study, rows=rows).trainings(difference)
    assert by_seed[1] - by_seed[0] == pytest.approx(0.1) and sum(by_seed.values()) / 2 == pytest.approx(
        difference.value
    )
    turned = replace(difference, arm="frozen", minus="adapted", value=-difference.value)
    assert replace(study, rows=rows).trainings(turned) == pytest.approx({seed: -v for seed, v in by_seed.items()})


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    study = study_of(make_folder(tmp_path))
    write_study(tmp_path / "rows.jsonl", study)
    back = read_study(tmp_path / "rows.jsonl")
    assert back.about == study.about and len(back.rows) == len(study.rows)
    for one, other in zip(back.rows, study.rows):
        assert (one.key, one.by_seed, one.n) == (other.key, other.by_seed, other.n)
        assert (one.value, one.low) == pytest.approx((other.value, other.low), rel=1e-6)
        assert one.variance == pytest.approx(other.variance, rel=1e-3)
    write_study(tmp_path / "again.jsonl", back)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_a_command_names_neither_folder_nor_workers_of_the_machine(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for options in ("--out /home/me/runs", "--out=/home/me --workers 2"):
        changed(folder, command=f"vismt run quickstart {options} seed=1")
        assert study_of(folder).about.command == "vismt run quickstart seed=1"


def test_an_unfinished_run_and_an_unknown_arm_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with pytest.raises(UserError, match=r"no arm 'adaptet', which a difference names. Near: 'adapted'"):
        study_of(folder, [("adaptet", "frozen")])
    with locked(folder), pytest.raises(UserError, match="a process works in it"):
        study_of(folder)
    changed(folder, finished=None)
    for unfinished in (folder, tmp_path / "none"):
        with pytest.raises(UserError, match="its evaluation has not ended"):
            study_of(unfinished)


def test_a_broken_file_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    study = study_of(make_folder(tmp_path))
    first = study.rows[0]
    for rows, words in (
        ([first, first], "number 2: repeats an earlier number"),
        ([replace(first, value=1.2)], "number 1: 1.2 is not a share"),
        ([replace(first, config_hash="other")], "config hash 'other' is not this run's"),
        ([replace(first, low=0.9)], "are not a count and an interval"),
    ):
        write_study(path, StudyRows(study.about, rows))
        with pytest.raises(UserError, match=words):
            read_study(path)
    write_study(path, study)
    text = path.read_text()
    path.write_text(text.replace('"value", "values": [0.5', '"value", "values": [0.7', 1))
    with pytest.raises(UserError, match="was changed or damaged"):
        read_study(path)
    path.write_text("\n".join(text.splitlines()[:3]) + "\n")
    with pytest.raises(UserError, match="was cut after line 3"):
        read_study(path)
    write_lines(path, [{**line, "extra": 1} for line in read_lines(path)] or [{"title": "x"}])
    with pytest.raises(UserError, match="rows '"):
        read_study(path)
    with pytest.raises(UserError, match="no such file"):
        read_study(tmp_path / "none.jsonl")


def test_committed_rows_name_no_folder_of_the_machine_that_ran() -> None:
    """That each file is a study is tested where the pages are made of it (tests/docs/test_numbers.py)."""
    assert studies()
    for path in studies().values():
        about, *rows = read_lines(path, whole=True)
        assert rows and "/tmp" not in about["command"] and "/home" not in about["command"]


def test_numbers_of_equal_values_are_not_certain(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for arm, value in (("none", 0.0), ("all", 1.0)):
        add(folder, Score("few-shot", "digits", "2-way", measure([value] * 4), CLEAN, "episodes"), arm)
    study = study_of(folder, [("all", "none")])
    none, whole, both = (
        number(study, arm=arm, protocol="2-way", minus=minus)
        for arm, minus in (("none", ""), ("all", ""), ("all", "none"))
    )
    assert none.variance == pytest.approx(whole.variance) and none.variance > 0.01
    assert both.variance == pytest.approx(none.variance) and both.value == 1 and both.low < both.high
