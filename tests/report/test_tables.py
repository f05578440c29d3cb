"""Tables of many arms and of corruptions: nothing is lost, best and ties are marked, every number has its n."""

import re

import pytest
from helpers.results import comparison as compared
from helpers.results import corruption

from vismt.report.comparison import Cell
from vismt.report.html import render_html, render_markdown
from vismt.report.report import Report
from vismt.report.tables import (
    cell_text,
    difference_text,
    interval_text,
    number_text,
    result_tables,
    scale_text,
    turned,
)
from vismt.stats import CLEAN, Condition

ARMS = [f"arm_{i}" for i in range(8)]


def comparison(data, condition=CLEAN, count=8, n=60, **changes):
    """Arm i has i per cent more than the first; the last is best, the one before its tie."""
    marks = [""] * (count - 2) + ["tie", "best"]
    cells = {f"arm_{i}": Cell(0.4 + 0.01 * i, 0.025, n, marks[i]) for i in range(count)}
    return compared(data, cells, condition, paired=True, **changes)


def attack(label):
    return Condition(label, "attack", label, 0.1)


def report(tables):
    return Report("a title", [], tables, "legend", [], [], "")


def test_few_arms_stay_as_they_are(tmp_path):
    (table,) = result_tables([comparison("digits", count=4)])
    assert not table.many and not table.folded and len(table.heads) == 7
    assert "| digits | clean | 40.0 ± 2.5 |" in render_markdown(report([table]), tmp_path)
    assert "<small>" not in render_html(report([table]))


def test_a_table_says_that_lower_is_better():
    (table,) = result_tables([comparison("rooms", count=4, metric="RMSE in m", scale="number", better="lower")])
    assert table.title == "5-way 1-shot, RMSE in m, lower is better"
    (table,) = result_tables([comparison("digits", count=4)])
    assert table.title == "5-way 1-shot, accuracy in %"


def test_many_arms_are_rows_in_markdown(tmp_path):
    rows = [
        comparison(data, condition)
        for data in ("digits", "average")
        for condition in (CLEAN, attack("PGD"), attack("FGSM"))
    ]
    (table,) = result_tables(rows)
    assert table.many
    text = render_markdown(report([table]), tmp_path)
    lines = text.splitlines()
    at = lines.index("| digits, n = 60 episodes | clean | PGD | FGSM |")
    assert lines[at + 1] == "| --- | ---: | ---: | ---: |"
    assert lines[at + 2] == "| arm\\_0 | 40.0 ± 2.5 | 40.0 ± 2.5 | 40.0 ± 2.5 |"
    assert lines[at + 8] == "| arm\\_6 | 46.0 ± 2.5 ≈ | 46.0 ± 2.5 ≈ | 46.0 ± 2.5 ≈ |"
    assert lines[at + 9] == "| arm\\_7 | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** |"
    assert "| average, n = 60 episodes | clean | PGD | FGSM |" in text
    assert max(map(len, lines)) < 100


def test_many_arms_are_narrow_columns_in_html():
    (table,) = result_tables([comparison("digits")])
    html = render_html(report([table]))
    assert '<table class="many">' in html and "arm_<wbr>7" in html
    assert '<td class="number">40.0<small>± 2.5</small></td>' in html
    assert '<td class="number">46.0 ≈<small>± 2.5</small></td>' in html
    assert '<td class="number best"><span>47.0 ★<small>± 2.5</small></span></td>' in html


def test_a_turned_table_is_cut_after_some_conditions_and_tells_every_n():
    rows = [comparison("digits", attack(f"attack {i}"), n=60 if i else 50) for i in range(8)]
    first, second = turned(result_tables(rows)[0])
    assert first.heads == ["digits, n = 50 / 60 episodes", *(f"attack {i}" for i in range(6))]
    assert second.heads == ["digits, n = 60 episodes", "attack 6", "attack 7"]
    assert [row[0] for row in first.rows] == [row[0] for row in second.rows] == ARMS
    assert first.best == {(7, column) for column in range(1, 7)} and second.best == {(7, 1), (7, 2)}


def test_many_corruptions_have_a_table_of_their_own(tmp_path):
    few = [comparison("digits", count=2), *(comparison("digits", corruption("fog", s), 2) for s in (1, 2, 3))]
    assert [len(table.rows) for table in result_tables(few)] == [4]
    plain, corrupted = result_tables([*few, comparison("digits", corruption("fog", 5), 2)])
    assert [row[1] for row in plain.rows] == ["clean"]
    assert [row[1] for row in corrupted.rows] == [f"fog {s}" for s in (1, 2, 3, 5)]
    assert corrupted.folded and "corruptions" in corrupted.title and len(corrupted.best) == 4
    html = render_html(report([plain, corrupted]))
    assert re.search(r"<details><summary>5-way 1-shot, corruptions, accuracy in %</summary><div", html)
    assert "| digits | fog 5 | 40.0 ± 2.5 ≈ | **41.0 ± 2.5 ★** | 60 |" in render_markdown(
        report([plain, corrupted]), tmp_path
    )


def test_tasks_are_named_where_there_are_several():
    depth = comparison("rooms", count=2, task="depth", protocol="test", metric="RMSE in m", scale="number")
    parts = comparison("rooms", count=2, task="parts", protocol="test", metric="mIoU")
    assert [table.title for table in result_tables([depth, parts])] == [
        "depth: test, RMSE in m",
        "parts: test, mIoU in %",
    ]


@pytest.mark.parametrize(
    ("mean", "half", "scale", "text"),
    [
        (0.5, 0.0253, "share", "50.0 ± 2.5"),
        (-0.9, 1.27, "number", "−0.9 ± 1.3"),
        (-0.9, 0.113, "number", "−0.90 ± 0.11"),
        (2.0, 0.00042, "number", "2.00000 ± 0.00042"),
        (25.0, 63.5, "number", "25.0 ± 63.5"),
        (1.25, 0.0, "number", "1.25 ± 0"),
    ],
)
def test_a_number_is_as_exact_as_its_width(mean, half, scale, text):
    assert interval_text(mean, half, scale) == text


def test_numbers_and_scales():
    assert number_text(0.123, "share") == "12.3" and number_text(0.1, "share", sign=True) == "+10.0"
    assert number_text(-1.23456, "number") == "−1.235" and number_text(2.0, "number", sign=True) == "+2"
    assert scale_text("mIoU", "share", "higher") == "mIoU in % ↑" and scale_text("RMSE in m", "number") == "RMSE in m"
    assert scale_text("RMSE in m", "number", "lower") == "RMSE in m ↓"


def test_a_missing_number_is_a_dash():
    row = comparison("digits", count=2)
    assert cell_text(None, row.row) == "–" == difference_text(row)
    assert cell_text(Cell(0.5, 0.1, 9, "tie"), row.row) == "50.0 ± 10.0 ≈"
    table = result_tables([comparison("digits", count=2), comparison("crops", count=3)])[0]
    assert table.rows[0][4] == "–" and table.rows[1][4] == "42.0 ± 2.5 ★"
