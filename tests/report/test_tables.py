"""Tables of many arms and of corruptions: nothing is lost, best and ties are marked, every number has its n."""

import re
from dataclasses import replace

import pytest
from helpers.results import cell, corruption, estimated
from helpers.results import comparison as compared

from vismt.report.renderers import render_html, render_latex, render_markdown
from vismt.report.tables import (
    Report,
    Section,
    Table,
    bounds_text,
    cell_text,
    difference_tables,
    difference_text,
    interval_text,
    measure_tables,
    number_text,
    result_tables,
    scale_text,
    split_wide_table,
    without_further,
)
from vismt.uncertainty.intervals import CLEAN, Condition

ARMS = [f"arm_{i}" for i in range(8)]


def comparison(data, condition=CLEAN, count=8, n=60, **changes):
    """Arm i has i per cent more than the first; the last is best, the one before its tie."""
    marks = [""] * (count - 2) + ["tie", "best"]
    cells = {f"arm_{i}": cell(0.4 + 0.01 * i, 0.025, n, marks[i]) for i in range(count)}
    return compared(data, cells, condition, paired=True, **changes)


def attack(label):
    return Condition(label, "attack", label, 0.1)


def report(tables):
    return Report("a title", sections=[Section("Results", tables)])


def shown(comparisons):
    """The only table of results."""
    ((table, _),) = result_tables(comparisons)
    return table


def test_all_measures_of_a_task_stand_in_one_table_and_the_other_tables_have_its_score_alone():
    score = comparison("rooms", count=2, task="depth", metric="RMSE in m", scale="number", better="lower")
    further = comparison("rooms", count=2, task="depth", metric="delta 1", further=True)
    other = comparison("rooms", count=2, task="semseg", metric="mIoU")
    assert without_further([score, further, other]) == [score, other]
    ((table, note),) = measure_tables([score, further, other])  # semseg has its score alone
    assert table.heads == ["Measure", "arm_0", "arm_1"] and table.title.startswith("depth: 5-way 1-shot, all measures")
    assert [row[0] for row in table.rows] == ["RMSE in m ↓ (score)", "delta 1 in % ↑"]
    assert table.rows[1][1] == "40.0 ± 2.5 ≈" and table.rows[0][1].startswith("0.4") and (1, 2) in table.best
    assert "delta 1 in" in render_latex([(table, note)])
    ((table, _),) = measure_tables([score, further, replace(score, data="halls"), replace(further, data="halls")])
    assert table.heads[:2] == ["Measure", "Data"] and len(table.rows) == 4


def test_few_arms_stay_as_they_are(tmp_path):
    ((table, note),) = result_tables([comparison("digits", count=4)])
    # every row is clean, so there is no column of conditions
    assert table.heads == ["Data", "arm_0", "arm_1", "arm_2", "arm_3"] and not table.folded
    assert table.title == "5-way 1-shot, accuracy in %, n = 60 episodes"
    assert "| digits | 40.0 ± 2.5 |" in render_markdown(report([(table, note)]), tmp_path)
    table = shown([comparison("digits", count=4), comparison("digits", attack("PGD"), count=4, n=50)])
    # one set stands in the title
    assert table.heads[0] == "Condition" and [row[0] for row in table.rows] == ["clean", "PGD"]
    assert table.title == "5-way 1-shot, accuracy in %, digits" and [row[-1] for row in table.rows] == ["60", "50"]


def test_a_table_says_what_its_intervals_cover():
    cells = {"frozen": cell(0.4, 0.1, 60, covers="images"), "adapted": cell(0.5, 0.1, 60, "", 3, "images+seeds")}
    ((_, note),) = result_tables([compared("digits", cells)])
    assert note == (
        "± and [ ]: frozen: 95 % over new images of these classes; "
        "adapted: 95 % over new images of these classes and training seeds (3 seeds)."
    )
    ((_, note),) = result_tables([compared("digits", {"frozen": cells["frozen"]})])
    assert note == "± and [ ]: 95 % over new images of these classes."


def test_a_table_says_that_lower_is_better():
    table = shown([comparison("rooms", count=4, metric="RMSE in m", scale="number", better="lower")])
    assert table.title.startswith("5-way 1-shot, RMSE in m, lower is better")


def test_many_arms_are_rows_and_sets_columns(tmp_path):
    rows = [
        comparison(data, condition, n=60 if data == "digits" else 120)
        for data in ("digits", "average")
        for condition in (CLEAN, attack("PGD"), attack("FGSM"))
    ]
    table = shown(rows)
    assert table.heads == ["Condition", "Model", "digits, n = 60", "average, n = 120"] and table.texts == 2
    assert [row[0] for row in table.rows] == ["clean"] * 8 + ["PGD"] * 8 + ["FGSM"] * 8
    assert [row[1] for row in table.rows] == 3 * ARMS
    assert table.best == {(row, column) for row in (7, 15, 23) for column in (2, 3)}
    text = render_markdown(report([(table, "")]), tmp_path)
    assert "| clean | arm\\_7 | **47.0 ± 2.5 ★** | **47.0 ± 2.5 ★** |" in text
    assert '<td class="text">arm_<wbr>7</td>' in render_html(report([(table, "")]))
    long = Table("t", ["a_head"], [["a_name_of_more_than_26_letters_is_broken"]], set(), texts=1)
    assert '<th class="text long">a_<wbr>head' in (html := render_html(report([(long, "")]))) and "_<wbr>26" in html


def test_many_arms_on_one_set_have_conditions_as_columns():
    rows = [comparison("digits", attack(f"attack {i}"), n=60 if i else 50) for i in range(3)]
    table = shown(rows)
    assert table.title == "5-way 1-shot, accuracy in %, digits"
    assert table.heads == ["Model", "attack 0, n = 50", "attack 1, n = 60", "attack 2, n = 60"]
    assert [row[0] for row in table.rows] == ARMS and table.best == {(7, 1), (7, 2), (7, 3)}


def test_several_measures_are_columns_of_one_table():
    """Main measure first, each with its direction; differences to the baseline are a table of their own."""
    rows = []
    for condition in (CLEAN, Condition("temperature", "variant", "temperature")):
        for metric, scale, better in (("accuracy", "share", "higher"), ("NLL in nats", "number", "lower")):
            c = comparison("films", condition, count=2, metric=metric, scale=scale, better=better)
            rows.append(replace(c, base="arm_0", differences={"arm_1": estimated(0.011, 0.001, 0.021)}))
    table = shown(rows)
    assert table.title == "5-way 1-shot, films, n = 60 episodes"
    assert table.heads == ["Condition", "Model", "accuracy in % ↑", "NLL in nats ↓"]
    assert [row[:2] for row in table.rows] == [
        [condition, arm] for condition in ("clean", "temperature") for arm in ("arm_0", "arm_1")
    ]
    ((table, note),) = difference_tables(rows)
    assert table.title == "Difference to arm_0: 5-way 1-shot, films, n = 60 episodes"
    assert table.rows[0] == ["clean", "arm_1", "+1.1 [+0.1, +2.1]", "+0.011 [+0.001, +0.021]"]
    assert [row[0] for row in table.rows] == ["clean", "temperature"] and "on the same examples" in note
    assert not table.folded


def test_the_strongest_attack_is_the_first_of_the_differences():
    """It is the one that leaves the best arm the least; tasks with other baselines name theirs."""
    found = {"base": "a", "differences": {"b": estimated(0.1, 0.05, 0.15)}}
    values = {CLEAN: 0.9, attack("weak"): 0.5, attack("strong"): 0.2, Condition("T", "variant", "T"): 0.9}
    cells = {condition: {"a": cell(0.1, 0.1, 60), "b": cell(value, 0.1, 60)} for condition, value in values.items()}
    rows = [replace(compared("digits", of, condition), **found) for condition, of in cells.items()]
    ((table, _),) = difference_tables(rows)
    assert table.heads == ["Model", "strong", "clean", "weak", "T"] and [row[0] for row in table.rows] == ["b"]
    others = [replace(compared("digits", cells[CLEAN], task="depth"), base="c", differences=found["differences"])]
    assert difference_tables([*rows, *others])[0][0].title.startswith("Difference to few-shot: a, depth: c:")
    assert difference_tables([compared("digits", cells[CLEAN])]) == []


def test_several_measures_of_several_sets_have_a_band_for_each_set():
    rows = [
        comparison(data, count=2, metric=metric, n=60 if data == "films" else 50)
        for metric in ("accuracy", "F1")
        for data in ("films", "plays")
    ]
    table = shown(rows)
    assert table.title == "5-way 1-shot, n = 60 / 50 episodes"
    assert table.heads == ["Data", "Model", "accuracy in % ↑", "F1 in % ↑"]
    assert [row[:2] for row in table.rows] == [[data, arm] for data in ("films", "plays") for arm in ARMS[:2]]
    assert table.best == {(1, 2), (1, 3), (3, 2), (3, 3)} and table.texts == 2


def test_tasks_of_one_protocol_are_columns_of_one_table():
    depth = comparison(
        "rooms", count=2, task="depth", protocol="test", metric="RMSE in m", scale="number", better="lower"
    )
    parts = comparison("rooms", count=2, task="parts", protocol="test", metric="mIoU")
    table = shown([depth, parts])
    assert table.title == "test, rooms, n = 60 episodes"
    assert table.heads == ["Model", "depth RMSE in m ↓", "parts mIoU in % ↑"]
    assert [row[0] for row in table.rows] == ["arm_0", "arm_1"]
    other = comparison("rooms", count=2, task="parts", protocol="validation", metric="mIoU")
    assert [table.title for table, _ in result_tables([depth, other])] == [
        "depth: test, RMSE in m, lower is better, n = 60 episodes",
        "parts: validation, mIoU in %, n = 60 episodes",
    ]


def test_a_measure_of_other_conditions_has_a_table_of_its_own():
    """Else its column would be empty in every row but one."""
    error = comparison(
        "digits", Condition("all corruptions", "corruption", "all"), count=2, metric="error", better="lower"
    )
    rows = [comparison("digits", count=2), comparison("digits", attack("PGD"), count=2), error]
    tables = [table for table, _ in result_tables(rows)]
    assert [table.title for table in tables] == [
        "5-way 1-shot, accuracy in %, digits, n = 60 episodes",
        "5-way 1-shot, error in %, lower is better, digits, n = 60 episodes",
    ]
    assert [len(table.rows) for table in tables] == [2, 1]


def test_an_arm_may_be_named_average():
    rows = [comparison("digits", count=8)]
    cells = {f"arm_{i}" if i else "average": cell for i, cell in enumerate(rows[0].cells.values())}
    html = render_html(report(result_tables([replace(rows[0], cells=cells)])))
    assert 'class="average"' not in html and "average" in html
    assert 'class="average"' in render_html(report(result_tables([comparison("average", count=2)])))


def test_a_wide_table_is_cut_between_columns_and_keeps_its_first():
    rows = [["a text of several words", *(f"{i}.0 ± 2.5" for i in range(12))], ["b", "1.0 ± 2.5", *["–"] * 11]]
    table = Table("wide", ["Arm", *(f"column {i}" for i in range(12))], rows, {(0, 1), (0, 12)}, texts=1)
    first, second = split_wide_table(table, 120)
    assert first.heads[0] == second.heads[0] == "Arm" and first.heads[1:] + second.heads[1:] == table.heads[1:]
    assert first.rows[0][1:] + second.rows[0][1:] == rows[0][1:]
    assert [len(part.rows) for part in (first, second)] == [2, 1]  # no row without a number
    assert first.best == {(0, 1)} and second.best == {(0, len(second.heads) - 1)}
    assert split_wide_table(table, 1000) == [table]
    # one column that is wider than the page is not lost
    assert [part.heads for part in split_wide_table(Table("t", ["A", "b"], [["x", "y" * 50]], set(), texts=1), 30)] == [
        ["A", "b"]
    ]


def test_many_corruptions_have_a_table_of_their_own(tmp_path):
    few = [comparison("digits", count=2), *(comparison("digits", corruption("fog", s), 2) for s in (1, 2, 3))]
    assert [len(table.rows) for table, _ in result_tables(few)] == [4]
    tables = result_tables([*few, comparison("digits", corruption("fog", 5), 2)])
    plain, corrupted = (table for table, _ in tables)
    assert [row[0] for row in plain.rows] == ["digits"] and "Condition" not in plain.heads
    assert [row[0] for row in corrupted.rows] == [f"fog {s}" for s in (1, 2, 3, 5)]
    assert corrupted.folded and "corruptions" in corrupted.title and len(corrupted.best) == 4
    html = render_html(report(tables))
    assert re.search(r"<details><summary>5-way 1-shot, corruptions, accuracy in %, digits, n = 60", html)
    assert "| fog 5 | 40.0 ± 2.5 ≈ | **41.0 ± 2.5 ★** |" in render_markdown(report(tables), tmp_path)


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
        (0.9996, 0.00031, "share", "99.960 ± 0.031"),
        (0.0051, 0.005, "share", "0.5 ± 0.5"),
        (-1e-9, 0.1, "number", "0.00 ± 0.10"),
    ],
)
def test_a_number_is_as_exact_as_its_width(mean, half, scale, text):
    assert interval_text(mean, mean - half, mean + half, scale) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "scale", "text"),
    [
        (0.0, 0.0, 0.161, "share", "0.0 [0.0, 16.1]"),
        (0.95, 0.9, 1.0, "share", "95.0 ± 5.0"),
        (0.015, -0.006, 0.036, "share", "1.5 [0.0, 3.6]"),  # a share is not negative
        (0.28, -0.86, 1.42, "share", "28.0 [0.0, 100.0]"),
        (2.0, 1.5, 3.0, "number", "2.00 [1.50, 3.00]"),
        (2.0, 1.5, 2.5004, "number", "2.00 ± 0.50"),  # equal when rounded
        (0.1, 0.1 - 0.02500000001, 0.125, "share", "10.0 ± 2.5"),  # not even by the last digit of a float
    ],
)
def test_an_interval_that_is_not_even_is_written_by_its_ends(value, low, high, scale, text):
    assert interval_text(value, low, high, scale) == text


def test_an_average_of_many_sets_also_has_the_interval_over_sets():
    values = {"average": (0.5, 0.7), **{f"set{i}": (0.3 + 0.1 * i, 0.7) for i in range(5)}}
    rows = [
        replace(
            compared(data, {"a": cell(a, 0.05, 60), "b": cell(b, 0.05, 60)}),
            base="a",
            differences={"b": estimated(b - a, b - a - 0.05, b - a + 0.05)},
        )
        for data, (a, b) in values.items()
    ]
    ((_, note),), ((_, differences),) = result_tables(rows), difference_tables(rows)
    # ± 2.776445 * 0.158114 / sqrt 5 = ± .1963
    assert note.endswith(" Average, 95 % over new domains: clean, a [30.4, 69.6], b [70.0, 70.0].")
    assert differences.endswith(" Average, 95 % over new domains: clean, b [+0.4, +39.6].")
    assert "domains" not in result_tables(rows[:5])[0][1]  # of four sets


def test_a_difference_of_shares_may_be_negative():
    assert interval_text(-0.1, -0.16, -0.04, "share", sign=True) == "−10.0 ± 6.0"
    assert interval_text(0.5, -0.4, 1.4, "share", sign=True) == "+50.0 [−40.0, +100.0]"


def test_numbers_and_scales():
    assert number_text(0.123, "share") == "12.3" and number_text(0.1, "share", sign=True) == "+10.0"
    assert number_text(-1.23456, "number") == "−1.235" and number_text(2.0, "number", sign=True) == "+2"
    assert number_text(-0.0001, "share", sign=True) == "0.0" and number_text(-0.0, "number") == "0"
    assert bounds_text(0.0123456, -0.1, 0.1246912, "number", sign=True) == "+0.01 [−0.10, +0.12]"
    assert scale_text("mIoU", "share", "higher") == "mIoU in % ↑" and scale_text("RMSE in m", "number") == "RMSE in m"
    assert scale_text("RMSE in m", "number", "lower") == "RMSE in m ↓"


def test_a_missing_number_is_a_dash():
    row = comparison("digits", count=2)
    assert cell_text(None, row.row) == "–" == difference_text(row, "arm_1")
    assert cell_text(cell(0.5, 0.1, 9, "tie"), row.row) == "50.0 ± 10.0 ≈"
    table = shown([comparison("digits", count=2), comparison("crops", count=3)])
    assert table.rows[0][3] == "–" and table.rows[1][3] == "42.0 ± 2.5 ★"
