"""Tables of many models and of corruptions: nothing is lost, best and ties are marked, every number has its n."""

import json
import re
from dataclasses import replace

import pytest

from vismt.report.comparison import Cell, Comparison
from vismt.report.html import render_html, render_markdown
from vismt.report.report import Report
from vismt.report.tables import result_tables, turned

MODELS = [f"model_{i}" for i in range(8)]


def comparison(data, condition, count=8, n=60):
    """Model i has i per cent more than the first; the last is best, the one before its tie."""
    marks = [""] * (count - 2) + ["tie", "best"]
    cells = {f"model_{i}": Cell(0.4 + 0.01 * i, 0.025, n, marks[i]) for i in range(count)}
    return Comparison(data, "5-way 1-shot", condition, "accuracy", "episodes", 1, cells, None, True)


def report(tables):
    return Report("a title", [], tables, "legend", [], [], [], [], "")


def test_few_models_stay_as_they_are(tmp_path):
    (table,) = result_tables([comparison("digits", "clean", 4)])
    assert not table.many and not table.folded and len(table.heads) == 7
    assert "| digits | clean | 40.0 ± 2.5 |" in render_markdown(report([table]), tmp_path)
    assert "<small>" not in render_html(report([table]))


def test_a_table_says_that_lower_is_better():
    (table,) = result_tables([replace(comparison("rooms", "clean", 4), metric="depth RMSE in m", lower_is_better=True)])
    assert table.title == "5-way 1-shot, depth RMSE in m, lower is better"
    (table,) = result_tables([comparison("digits", "clean", 4)])
    assert table.title == "5-way 1-shot, accuracy in %"


def test_many_models_are_rows_in_markdown(tmp_path):
    made = [comparison(data, condition) for data in ("digits", "average") for condition in ("clean", "PGD", "FGSM")]
    (table,) = result_tables(made)
    assert table.many
    text = render_markdown(report([table]), tmp_path)
    lines = text.splitlines()
    at = lines.index("| digits, n = 60 episodes | clean | PGD | FGSM |")
    assert lines[at + 1] == "| --- | ---: | ---: | ---: |"
    assert lines[at + 2] == "| model\\_0 | 40.0 ± 2.5 | 40.0 ± 2.5 | 40.0 ± 2.5 |"
    assert lines[at + 8] == "| model\\_6 | 46.0 ± 2.5 ≈ | 46.0 ± 2.5 ≈ | 46.0 ± 2.5 ≈ |"
    assert lines[at + 9] == "| model\\_7 | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** |"
    assert "| average, n = 60 episodes | clean | PGD | FGSM |" in text
    assert max(map(len, lines)) < 100


def test_many_models_are_narrow_columns_in_html():
    (table,) = result_tables([comparison("digits", "clean")])
    html = render_html(report([table]))
    assert '<table class="many">' in html and "model_<wbr>7" in html
    assert '<td class="number">40.0<small>± 2.5</small></td>' in html
    assert '<td class="number">46.0 ≈<small>± 2.5</small></td>' in html
    assert '<td class="number best"><span>47.0 ★<small>± 2.5</small></span></td>' in html


def test_a_turned_table_is_cut_after_some_conditions_and_tells_every_n():
    made = [comparison("digits", f"attack {i}", n=60 if i else 50) for i in range(8)]
    first, second = turned(result_tables(made)[0])
    assert first.heads == ["digits, n = 50 / 60 episodes", *(f"attack {i}" for i in range(6))]
    assert second.heads == ["digits, n = 60 episodes", "attack 6", "attack 7"]
    assert [row[0] for row in first.rows] == [row[0] for row in second.rows] == MODELS
    assert first.best == {(7, column) for column in range(1, 7)} and second.best == {(7, 1), (7, 2)}


def test_many_corruptions_have_a_table_of_their_own(tmp_path):
    few = [comparison("digits", "clean", 2), *(comparison("digits", f"fog {s}", 2) for s in (1, 2, 3))]
    assert [len(table.rows) for table in result_tables(few)] == [4]
    plain, corrupted = result_tables([*few, comparison("digits", "fog 5", 2)])
    assert [row[1] for row in plain.rows] == ["clean"]
    assert [row[1] for row in corrupted.rows] == [f"fog {s}" for s in (1, 2, 3, 5)]
    assert corrupted.folded and "corruptions" in corrupted.title and len(corrupted.best) == 4
    html = render_html(report([plain, corrupted]))
    assert re.search(r"<details><summary>5-way 1-shot, corruptions, accuracy in %</summary><div", html)
    assert "| digits | fog 5 | 40.0 ± 2.5 ≈ | **41.0 ± 2.5 ★** | 60 |" in render_markdown(
        report([plain, corrupted]), tmp_path
    )


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
    (tmp_path / "masking.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, bad)))
    return [good, bad]


def test_the_masking_check_is_a_table(tmp_path, lines):
    from vismt.jobs.fewshot.masking_report import read_masking, told

    heads, rows = read_masking(tmp_path)
    assert heads == ["Model", "Data", "clean", "1/255", "64/255", "chance", "n (episodes)", "Verdict"]
    assert rows[0] == ["frozen", "digits, 5-way 1-shot", "60.0", "30.0", "0.0", "20.0", "10", "pass"]
    assert rows[1][-1] == "FAIL: still 50.0 % at 64/255, chance is 20.0 %"
    assert told(lines[:1]) == "frozen   pass   at 64/255: digits 0.0 %   (n = 10 episodes)"
    assert told(lines[1:]).startswith("adapted   FAIL   digits still 50.0 % at 64/255") and "no evidence" in told(
        lines[1:]
    )
    assert read_masking(tmp_path / "none") == ([], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracies": [0.5]}, "other radii"),
        ({"accuracies": ["a", "b", "c"]}, "is not what an evaluation writes"),
        ({"epsilons": 3}, "is not what an evaluation writes"),
    ],
)
def test_broken_masking_lines_are_named(tmp_path, lines, change, words):
    from vismt.errors import UserError
    from vismt.jobs.fewshot.masking_report import read_masking

    (tmp_path / "masking.jsonl").write_text(json.dumps({**lines[0], **change}) + "\n" + json.dumps(lines[1]) + "\n")
    with pytest.raises(UserError, match=words):
        read_masking(tmp_path)
