"""The gradient-masking check in a report: its table, its line for the console, and broken files."""

import pytest

from vismt.base.errors import UserError
from vismt.jobs.fewshot.evaluation import masking_summary
from vismt.jobs.masking import masking_section
from vismt.storage.lines import write_lines


@pytest.fixture
def lines(tmp_path):
    """Two models on one set, the second masked."""
    about = {"data": "digits", "protocol": "5-way 1-shot", "chance": 0.2, "n": 10, "epsilons": [0.0, 1 / 255, 64 / 255]}
    about["norm"] = "linf"
    good = {**about, "arm": "frozen", "accuracies": [0.6, 0.3, 0.0], "verdict": "pass", "passed": True}
    bad = {
        **about,
        "arm": "adapted",
        "accuracies": [0.6, 0.55, 0.5],
        "passed": False,
        "verdict": "FAIL: still 50.0 % at 64/255, chance is 20.0 %",
    }
    write_lines(tmp_path / "masking.jsonl", [good, bad])
    return [good, bad]


def test_the_masking_check_is_a_table(tmp_path, lines):
    ((table, _),) = masking_section(tmp_path, "Model", "episodes", "note").tables
    rows = table.rows
    assert table.heads == ["Model", "Data", "clean", "1/255", "64/255", "chance", "n (episodes)", "Verdict"]
    assert rows[0] == ["frozen", "digits, 5-way 1-shot", "60.0", "30.0", "0.0", "20.0", "10", "pass"]
    assert rows[1][-1] == "FAIL: still 50.0 % at 64/255, chance is 20.0 %"
    assert masking_summary(lines[:1]) == "frozen   pass   at 64/255: digits 0.0 %   (n = 10 episodes)"
    assert masking_summary(lines[1:]).startswith(
        "adapted   FAIL   digits still 50.0 % at 64/255"
    ) and "do not measure" in masking_summary(lines[1:])
    assert masking_section(tmp_path / "none", "Model", "episodes", "note").tables == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracies": [0.5]}, "other numbers of radii"),
        ({"accuracies": ["a", "b", "c"]}, "does not have the content that a run writes"),
        ({"epsilons": 3}, "does not have the content that a run writes"),
    ],
)
def test_broken_masking_lines_are_named(tmp_path, lines, change, words):
    write_lines(tmp_path / "masking.jsonl", [{**lines[0], **change}, lines[1]])
    with pytest.raises(UserError, match=words):
        masking_section(tmp_path, "Model", "episodes", "note")


def test_checks_of_classifiers_are_tables_by_norm_and_radii(tmp_path):
    about = {"data": "digits", "chance": 0.1, "n": 10, "accuracies": [0.6, 0.1], "verdict": "pass"}
    radii = {"a": ("l2", 13.9107), "b": ("l2", 97.3742), "c": ("l2", 13.9107), "d": ("linf", 64 / 255)}
    lines = [{**about, "arm": arm, "norm": norm, "epsilons": [0.0, end]} for arm, (norm, end) in radii.items()]
    write_lines(tmp_path / "masking.jsonl", lines)
    tables = [table for table, _ in masking_section(tmp_path, "Arm", "images", "note").tables]
    assert [(table.title, table.heads[2:4]) for table in tables] == [
        ("By l2 radius, accuracy in %", ["clean", "13.9107"]),
        ("By l2 radius, accuracy in %", ["clean", "97.3742"]),
        ("By linf radius, accuracy in %", ["clean", "64/255"]),
    ]
    assert [[row[0] for row in table.rows] for table in tables] == [["a", "c"], ["b"], ["d"]]
