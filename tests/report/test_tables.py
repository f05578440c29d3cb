"""Tables of many arms and of corruptions: nothing is lost, best and ties are marked, every number has its n."""

import re
from dataclasses import replace

import pytest
from helpers.results import comparison as compared
from helpers.results import corruption

from vismt.report.comparison import Cell
from vismt.report.renderers import render_html, render_markdown
from vismt.report.tables import (
    Report,
    Table,
    bounds_text,
    cell_text,
    difference_text,
    fitted,
    interval_text,
    number_text,
    result_tables,
    scale_text,
)
from vismt.uncertainty.intervals import CLEAN, Condition

ARMS = [f"arm_{i}" for i in range(8)]


def comparison(data, condition=CLEAN, count=8, n=60, **changes):
    """Arm i has i per cent more than the first; the last is best, the one before its tie."""
    marks = [""] * (count - 2) + ["tie", "best"]
    cells = {f"arm_{i}": Cell(0.4 + 0.01 * i, 0.025, n, marks[i]) for i in range(count)}
    return compared(data, cells, condition, paired=True, **changes)


def attack(label):
    return Condition(label, "attack", label, 0.1)


def report(tables):
    return Report("a title", [], [], tables, "legend", [], [], "")


def test_few_arms_stay_as_they_are(tmp_path):
    (table,) = result_tables([comparison("digits", count=4)])
    # every row is clean, so there is no column of conditions
    assert table.heads == ["Data", "arm_0", "arm_1", "arm_2", "arm_3", "n (episodes)"] and not table.folded
    assert "| digits | 40.0 ± 2.5 |" in render_markdown(report([table]), tmp_path)
    (table,) = result_tables([comparison("digits", count=4), comparison("digits", attack("PGD"), count=4)])
    assert table.heads[:2] == ["Data", "Condition"] and [row[1] for row in table.rows] == ["clean", "PGD"]


def test_a_table_says_that_lower_is_better():
    (table,) = result_tables([comparison("rooms", count=4, metric="RMSE in m", scale="number", better="lower")])
    assert table.title == "5-way 1-shot, RMSE in m, lower is better"
    (table,) = result_tables([comparison("digits", count=4)])
    assert table.title == "5-way 1-shot, accuracy in %"


def test_many_arms_are_rows_and_sets_columns(tmp_path):
    rows = [
        comparison(data, condition, n=60 if data == "digits" else 120)
        for data in ("digits", "average")
        for condition in (CLEAN, attack("PGD"), attack("FGSM"))
    ]
    (table,) = result_tables(rows)
    assert table.heads == ["Condition", "Arm", "digits, n = 60", "average, n = 120"] and table.texts == 2
    assert [row[0] for row in table.rows] == ["clean"] * 8 + ["PGD"] * 8 + ["FGSM"] * 8
    assert [row[1] for row in table.rows] == 3 * ARMS
    assert table.best == {(row, column) for row in (7, 15, 23) for column in (2, 3)}
    text = render_markdown(report([table]), tmp_path)
    assert "| clean | arm\\_7 | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** |" in text
    html = render_html(report([table]))
    assert '<td class="text">arm_7</td>' in html and "wbr" not in html  # a short name is not broken
    long = Table("t", ["a_head"], [["a_name_of_more_than_26_letters_is_broken"]], set(), texts=1)
    assert '<th class="text long">a_<wbr>head' in render_html(report([long])) and "_<wbr>26" in render_html(
        report([long])
    )


def test_many_arms_on_one_set_have_conditions_as_columns():
    rows = [comparison("digits", attack(f"attack {i}"), n=60 if i else 50) for i in range(3)]
    (table,) = result_tables(rows)
    assert table.title == "5-way 1-shot, accuracy in %, digits"
    assert table.heads == ["Arm", "attack 0, n = 50", "attack 1, n = 60", "attack 2, n = 60"]
    assert [row[0] for row in table.rows] == ARMS and table.best == {(7, 1), (7, 2), (7, 3)}


def test_several_measures_are_columns_of_one_table():
    """Main measure first, each with its direction; of two arms the difference is a row."""
    rows = []
    for condition in (CLEAN, Condition("temperature", "variant", "temperature")):
        for metric, scale, better in (("accuracy", "share", "higher"), ("NLL in nats", "number", "lower")):
            c = comparison("films", condition, count=2, metric=metric, scale=scale, better=better)
            rows.append(replace(c, difference=(0.011, 0.001, 0.021)))
    (table,) = result_tables(rows)
    assert table.title == "5-way 1-shot, films, n = 60 episodes"
    assert table.heads == ["Condition", "Arm", "accuracy in % ↑", "NLL in nats ↓"]
    assert [row[:2] for row in table.rows[:3]] == [
        ["clean", "arm_0"],
        ["clean", "arm_1"],
        ["clean", "arm_1 − arm_0"],
    ]
    assert table.rows[2][2:] == ["+1.1 [+0.1, +2.1]", "+0.011 [+0.001, +0.021]"] and len(table.rows) == 6


def test_several_measures_of_several_sets_have_a_band_for_each_set():
    rows = [
        comparison(data, count=2, metric=metric, n=60 if data == "films" else 50)
        for metric in ("accuracy", "F1")
        for data in ("films", "plays")
    ]
    (table,) = result_tables(rows)
    assert table.title == "5-way 1-shot, n = 60 / 50 episodes"
    assert table.heads == ["Data", "Arm", "accuracy in % ↑", "F1 in % ↑"]
    assert [row[:2] for row in table.rows] == [[data, arm] for data in ("films", "plays") for arm in ARMS[:2]]
    assert table.best == {(1, 2), (1, 3), (3, 2), (3, 3)} and table.texts == 2


def test_tasks_of_one_protocol_are_columns_of_one_table():
    depth = comparison(
        "rooms", count=2, task="depth", protocol="test", metric="RMSE in m", scale="number", better="lower"
    )
    parts = comparison("rooms", count=2, task="parts", protocol="test", metric="mIoU")
    (table,) = result_tables([depth, parts])
    assert table.title == "test, rooms, n = 60 episodes"
    assert table.heads == ["Arm", "depth RMSE in m ↓", "parts mIoU in % ↑"]
    assert [row[0] for row in table.rows] == ["arm_0", "arm_1"]
    other = comparison("rooms", count=2, task="parts", protocol="validation", metric="mIoU")
    assert [table.title for table in result_tables([depth, other])] == [
        "depth: test, RMSE in m, lower is better",
        "parts: validation, mIoU in %",
    ]


def test_a_measure_of_other_conditions_has_a_table_of_its_own():
    """Else its column would be empty in every row but one."""
    error = comparison(
        "digits", Condition("all corruptions", "corruption", "all"), count=2, metric="error", better="lower"
    )
    tables = result_tables([comparison("digits", count=2), comparison("digits", attack("PGD"), count=2), error])
    assert [table.title for table in tables] == [
        "5-way 1-shot, accuracy in %",
        "5-way 1-shot, error in %, lower is better",
    ]
    assert [len(table.rows) for table in tables] == [2, 1]


def test_an_arm_may_be_named_average():
    rows = [comparison("digits", count=8)]
    cells = {f"arm_{i}" if i else "average": cell for i, cell in enumerate(rows[0].cells.values())}
    html = render_html(report(result_tables([replace(rows[0], cells=cells)])))
    assert 'class="average"' not in html and "average" in html
    assert 'class="average"' in render_html(report(result_tables([comparison("average", count=2)])))


def test_a_wide_table_is_cut_between_columns_and_keeps_its_first():
    rows = [["a text of several words", *(f"{i}.0 ± 2.5" for i in range(12))]]
    table = Table("wide", ["Arm", *(f"column {i}" for i in range(12))], rows, {(0, 1), (0, 12)}, texts=1)
    first, second = fitted(table, 120)
    assert first.heads[0] == second.heads[0] == "Arm" and first.heads[1:] + second.heads[1:] == table.heads[1:]
    assert first.rows[0][1:] + second.rows[0][1:] == rows[0][1:]
    assert first.best == {(0, 1)} and second.best == {(0, len(second.heads) - 1)}
    assert fitted(table, 1000) == [table]
    # one column that is wider than the page is not lost
    assert [part.heads for part in fitted(Table("t", ["A", "b"], [["x", "y" * 50]], set(), texts=1), 30)] == [
        ["A", "b"]
    ]


def test_many_corruptions_have_a_table_of_their_own(tmp_path):
    few = [comparison("digits", count=2), *(comparison("digits", corruption("fog", s), 2) for s in (1, 2, 3))]
    assert [len(table.rows) for table in result_tables(few)] == [4]
    plain, corrupted = result_tables([*few, comparison("digits", corruption("fog", 5), 2)])
    assert [row[0] for row in plain.rows] == ["digits"] and "Condition" not in plain.heads
    assert [row[1] for row in corrupted.rows] == [f"fog {s}" for s in (1, 2, 3, 5)]
    assert corrupted.folded and "corruptions" in corrupted.title and len(corrupted.best) == 4
    html = render_html(report([plain, corrupted]))
    assert re.search(r"<details><summary>5-way 1-shot, corruptions, accuracy in %</summary><div", html)
    assert "| digits | fog 5 | 40.0 ± 2.5 ≈ | **41.0 ± 2.5 ★** | 60 |" in render_markdown(
        report([plain, corrupted]), tmp_path
    )


@pytest.mark.parametrize(
    ("mean", "half", "scale", "text"),
    [
        (0.5, 0.0253, "share", "50.0 ± 2.5"),
        (-0.9, 1.27, "number", "−0.9 ± 1.3"),
        (-0.9, 0.113, "number", "−0.90 ± 0.11"),
        (2.0, 0.00042, "number", "2.00000 ± 0.00042"),
        (25.0, 63.5, "number", "25 ± 64"),
        (1.25, 0.0, "number", "1.25 ± 0"),
        (0.1, 1e-17, "share", "10.0 ± 0.0"),
        (-0.0004, 0.02, "share", "0.0 ± 2.0"),
        (0.9996, 0.00041, "share", "99.960 ± 0.041"),
        (0.0051, 0.005, "share", "0.5 ± 0.5"),
        (-1e-9, 0.1, "number", "0.00 ± 0.10"),
    ],
)
def test_a_number_is_as_exact_as_its_width(mean, half, scale, text):
    assert interval_text(mean, half, scale) == text


def test_numbers_and_scales():
    assert number_text(0.123, "share") == "12.3" and number_text(0.1, "share", sign=True) == "+10.0"
    assert number_text(-1.23456, "number") == "−1.235" and number_text(2.0, "number", sign=True) == "+2"
    assert number_text(-0.0001, "share", sign=True) == "0.0" and number_text(-0.0, "number") == "0"
    assert bounds_text((0.0123456, -0.1, 0.1246912), "number") == "+0.01 [−0.10, +0.12]"
    assert scale_text("mIoU", "share", "higher") == "mIoU in % ↑" and scale_text("RMSE in m", "number") == "RMSE in m"
    assert scale_text("RMSE in m", "number", "lower") == "RMSE in m ↓"


def test_a_missing_number_is_a_dash():
    row = comparison("digits", count=2)
    assert cell_text(None, row.row) == "–" == difference_text(row)
    assert cell_text(Cell(0.5, 0.1, 9, "tie"), row.row) == "50.0 ± 10.0 ≈"
    table = result_tables([comparison("digits", count=2), comparison("crops", count=3)])[0]
    assert table.rows[0][3] == "–" and table.rows[1][3] == "42.0 ± 2.5 ★"
