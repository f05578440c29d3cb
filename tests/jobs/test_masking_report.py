"""The gradient-masking check in a report: its table, its line for the console, and broken files."""

import pytest

from vismt.errors import UserError
from vismt.jobs.fewshot.masking_report import summary, tables
from vismt.lines import write_lines


@pytest.fixture
def lines(tmp_path):
    """Two models on one set, the second masked."""
    about = {"data": "digits", "protocol": "5-way 1-shot", "chance": 0.2, "n": 10, "epsilons": [0.0, 1 / 255, 64 / 255]}
    good = {**about, "model": "frozen", "accuracies": [0.6, 0.3, 0.0], "verdict": "pass", "passed": True}
    bad = {
        **about,
        "model": "adapted",
        "accuracies": [0.6, 0.55, 0.5],
        "passed": False,
        "verdict": "FAIL: still 50.0 % at 64/255, chance is 20.0 %",
    }
    write_lines(tmp_path / "masking.jsonl", [good, bad])
    return [good, bad]


def test_the_masking_check_is_a_table(tmp_path, lines):
    ((table, note),) = tables(tmp_path)
    rows = table.rows
    assert "do not measure robustness" not in table.title and "do not measure robustness" in note
    assert table.heads == ["Model", "Data", "clean", "1/255", "64/255", "chance", "n (episodes)", "Verdict"]
    assert rows[0] == ["frozen", "digits, 5-way 1-shot", "60.0", "30.0", "0.0", "20.0", "10", "pass"]
    assert rows[1][-1] == "FAIL: still 50.0 % at 64/255, chance is 20.0 %"
    assert summary(lines[:1]) == "frozen   pass   at 64/255: digits 0.0 %   (n = 10 episodes)"
    assert summary(lines[1:]).startswith(
        "adapted   FAIL   digits still 50.0 % at 64/255"
    ) and "do not measure" in summary(lines[1:])
    assert tables(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracies": [0.5]}, "other radii"),
        ({"accuracies": ["a", "b", "c"]}, "is not what an evaluation writes"),
        ({"epsilons": 3}, "is not what an evaluation writes"),
    ],
)
def test_broken_masking_lines_are_named(tmp_path, lines, change, words):
    write_lines(tmp_path / "masking.jsonl", [{**lines[0], **change}, lines[1]])
    with pytest.raises(UserError, match=words):
        tables(tmp_path)
