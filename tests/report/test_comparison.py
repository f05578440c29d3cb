"""Comparisons of a hand-made run folder: numbers by hand, pairs, ties and averages."""

import math
import shutil
from dataclasses import replace

import pytest
from helpers.results import HASH, PGD, add, corruption, half, measure, rows_of, write_lines
from helpers.run_folder import FROZEN, add_arm, make_folder
from scipy.stats import t as student

from vismt.report.comparison import compare_results
from vismt.report.results import ValuesByExample, read_results
from vismt.report.tables import difference_tables, result_tables
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import CLEAN, Condition, Estimate, Score

# mean 0.5; squares of the deviations .09 + .01 + .01 + .09 = .2; std = sqrt(.2 / 3) = .2582; t(3) = 3.1824 * .2582 / 2 = .4109
ERROR = math.sqrt(0.2 / 3) / 2
HALF = 3.182446 * ERROR
# of the average over two sets with this error each: t at six degrees of freedom
AVERAGE_HALF = 2.446912 * ERROR / math.sqrt(2)


PARTS = {"0": "0", "1": "1", "2": "0", "3": "1"}
PGD_2 = Condition("PGD-2", "attack", "PGD linf", 0.1)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def comparisons(folder):
    results = compare_results(read_results(folder / "results.jsonl", HASH), ValuesByExample(folder))
    return {(c.data, c.condition): c for c in results}


def notes(results):
    """The note of each table of numbers and of differences."""
    found = list(results.values())
    return [note for _, note in [*result_tables(found), *difference_tables(found)]]


def difference(c):
    """(adapted - frozen, low, high)."""
    return (c.differences["adapted"].mean, *c.differences["adapted"].bounds)


def records_of(folder, data, arm):
    return folder / "records" / f"few-shot-{data}-5-way-1-shot-{arm}-accuracy.jsonl"


def test_paired_differences_decide_where_intervals_overlap(folder):
    results = comparisons(folder)
    clean = results["digits", "clean"]
    # every episode gains exactly 0.1, and a difference without any spread says nothing about other episodes
    assert half(clean.cells["frozen"]) == pytest.approx(HALF) and clean.cells["frozen"].value == 0.5
    assert (clean.cells["adapted"].mark, clean.cells["frozen"].mark) == ("best", "tie") and clean.paired
    assert difference(clean) == pytest.approx((0.1, 0.1, 0.1))
    # 0.5 +- 0.411 and 0.7 +- 0.411 overlap, but the episodes gain 0.19 to 0.21: no tie
    for arm, step in (("low", 0.0), ("high", 0.2)):
        values = [value + step + 0.01 * (number % 2) for number, value in enumerate(FROZEN)]
        add_arm(folder, "other", arm, values if step else FROZEN, FROZEN)
    other = comparisons(folder)["other", "clean"]
    assert (other.cells["high"].mark, other.cells["low"].mark) == ("best", "") and other.paired
    # crops: differences .1, -.05, .1, -.05, mean .025, an interval around zero
    crops = results["crops", "clean"]
    assert difference(crops)[0] == pytest.approx(0.025) and difference(crops)[1] < 0 < difference(crops)[2]
    assert (crops.cells["adapted"].mark, crops.cells["frozen"].mark) == ("best", "tie")


def test_without_records_the_intervals_decide(folder):
    for path in (folder / "records").iterdir():
        path.unlink()
    results = comparisons(folder)
    clean, attacked = results["digits", "clean"], results["crops", PGD.label]
    assert clean.cells["frozen"].mark == "tie" and not clean.differences and not clean.paired
    # .1 +- 3.18 * .1155 / 2 = .1 +- .184 ends at .284; .45 +- .092 starts at .358: apart
    assert attacked.cells["frozen"].mark == ""
    ((table, _),) = result_tables(list(results.values()))
    assert all(row[1].endswith(" (unpaired)") for row in table.rows)


def test_a_measure_with_bounds_is_not_paired(folder):
    """Its records, which an earlier evaluation may have left, are of another measure."""
    for arm, value in (("frozen", 0.5), ("adapted", 0.6)):
        ece = measure([value] * 4, "ECE-15", error=Estimate.within(value, (0.1, 0.9)), paired=False)
        score = Score("few-shot", "digits", "5-way 1-shot", ece, CLEAN)
        add(folder, score, arm)
    compared = next(
        c
        for c in compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder))
        if c.row.metric == "ECE-15"
    )
    assert not compared.paired and not compared.differences and compared.cells["frozen"].mark == "tie"
    assert half(compared.cells["frozen"]) == pytest.approx(0.4) and half(compared.cells["adapted"]) == pytest.approx(
        0.5
    )
    assert not list((folder / "records").glob("*ECE*"))


def test_records_that_do_not_give_the_number_are_not_used(folder):
    add_arm(folder, "other", "frozen", FROZEN, FROZEN)
    add_arm(folder, "other", "adapted", [v + 0.1 for v in FROZEN], FROZEN)
    path = records_of(folder, "other", "adapted")
    lines = read_lines(path)
    lines[3]["clean"] += 0.05
    write_lines(path, lines)
    results = comparisons(folder)
    assert not results["other", "clean"].paired and results["other", PGD.label].paired
    write_lines(path, lines[:3])
    assert not comparisons(folder)["other", PGD.label].paired  # 3 of 4 examples


def test_marks_have_the_level_of_all_criteria(folder):
    """With one set and condition, a difference of three standard errors is shown between two models, and not among five."""
    steps = [0.1, 0.3, 0.1, 0.3]  # mean 0.2, standard error 0.0577: 3.46 of them, and t(3) = 3.18 at 95 %
    add_arm(folder, "one", "a", FROZEN, FROZEN, protocol="p")
    add_arm(folder, "one", "b", [value + step for value, step in zip(FROZEN, steps)], FROZEN, protocol="p")
    rows = [row for row in read_results(folder / "results.jsonl") if row.data == "one" and row.condition == "clean"]

    def marks():
        (c,) = compare_results(rows, ValuesByExample(folder))
        return {arm: cell.mark for arm, cell in c.cells.items()}

    assert marks() == {"a": "", "b": "best"}
    for arm in "cde":
        rows += [replace(rows[0], arm=arm)]
        add_arm(folder, "one", arm, FROZEN, FROZEN, protocol="p")
    assert marks() == {"b": "best", **dict.fromkeys("acde", "tie")}


def test_an_average_leaves_out_arms_that_were_not_trained_on_all_sets(folder):
    rows = read_results(folder / "results.jsonl")
    for arm, kept in (("adapted", ["frozen"]), ("frozen", ["adapted"])):
        other = [replace(row, untrained=row.arm == arm and row.data == "crops") for row in rows]
        found = {(c.data, c.condition): c for c in compare_results(other, ValuesByExample(folder))}
        assert list(found["average", "clean"].cells) == kept and len(found["crops", "clean"].cells) == 2
        assert found["crops", "clean"].models == kept


def test_records_pair_by_example_not_by_line(folder):
    path = records_of(folder, "digits", "adapted")
    write_lines(path, read_lines(path)[::-1])
    assert difference(comparisons(folder)["digits", "clean"]) == pytest.approx((0.1, 0.1, 0.1))


def test_records_of_other_examples_are_not_paired(folder):
    path = records_of(folder, "digits", "adapted")
    write_lines(path, [{**row, "example": row["example"].replace("3", "7")} for row in read_lines(path)])
    clean = comparisons(folder)["digits", "clean"]
    assert not clean.paired and not clean.differences and clean.cells["frozen"].mark == "tie"


def test_examples_that_are_right_or_wrong(folder):
    for arm, right in (("frozen", [1, 0, 0, 0]), ("adapted", [1, 1, 1, 0])):
        add(folder, Score("few-shot", "set", "all images", measure(right, counts=True), CLEAN, "images"), arm)
    # right in 1 and 3 of 4: + 0.5 on the same images
    assert difference(comparisons(folder)["set", "clean"])[0] == pytest.approx(0.5)


def test_average_over_sets(folder):
    average = comparisons(folder)["average", "clean"]
    # (0.5 + 0.5) / 2 and (0.6 + 0.525) / 2; errors combine as sqrt(e^2 + e^2) / 2; n adds up
    assert average.cells["frozen"].value == pytest.approx(0.5)
    assert average.cells["adapted"].value == pytest.approx(0.5625)
    assert half(average.cells["frozen"]) == pytest.approx(AVERAGE_HALF) and average.cells["frozen"].n == 8
    # differences: .1 without spread, and .025 with std sqrt(4 * .075^2 / 3) = .0866: half t(3) * .0866 / 2 / 2 = .06890
    assert difference(average) == pytest.approx((0.0625, 0.0625 - 0.0689, 0.0625 + 0.0689), abs=1e-4)
    assert average.cells["frozen"].mark == "tie"


@pytest.mark.parametrize("records", [True, False])
def test_where_lower_is_better_the_lowest_is_best(folder, records):
    """By the same numbers, with and without pairs, on the sets and on their average."""
    error = {"variance": 0.04**2 / 3.182446**2, "freedom": 3.0, "bias": [0.0, 0.0]}
    rows = [{**row, "low": row["value"] - 0.04, "high": row["value"] + 0.04, **error} for row in rows_of(folder)]
    if not records:
        shutil.rmtree(folder / "records")
    marks = {}
    for better in ("higher", "lower"):
        write_lines(folder / "results.jsonl", [{**row, "better": better} for row in rows])
        results = comparisons(folder)
        assert all(c.row.better == better for c in results.values())
        marks[better] = {
            data: [results[data, "clean"].cells[arm].mark for arm in ("frozen", "adapted")]
            for data in ("digits", "average")
        }
    # 0.5 and 0.6 on digits, beyond the widths; 0.5 and 0.5625 on average, whose unpaired reach is 2 * 0.04 / sqrt 2 at six
    # degrees of freedom for three, and whose difference is ± 0.0689; on digits the difference has no spread
    other = "tie" if records else ""
    assert marks["higher"] == {"digits": [other, "best"], "average": [other, "best"]}
    assert marks["lower"] == {"digits": ["best", other], "average": ["best", other]}


def test_no_average_of_one_set_or_of_unequal_arms(tmp_path):
    add_arm(tmp_path, "a", "frozen", FROZEN, FROZEN)
    assert list(comparisons(tmp_path)) == [("a", "clean"), ("a", PGD.label)]
    assert comparisons(tmp_path)["a", "clean"].cells["frozen"].mark == ""
    add_arm(tmp_path, "b", "adapted", FROZEN, FROZEN)
    assert "average" not in {data for data, _ in comparisons(tmp_path)}


def test_rows_of_single_trainings_are_not_compared(folder):
    before = comparisons(folder)["digits", "clean"].cells
    with_trainings(folder, "digits", "adapted", [0.9, 0.9])
    cells = comparisons(folder)["digits", "clean"].cells
    assert list(cells) == list(before) and cells["adapted"].value == 0.6


def with_trainings(folder, data, arm, scores, first=0):
    """The rows of an arm's trainings, of four episodes with one score each."""
    for seed, value in enumerate(scores, first):
        add(folder, Score("few-shot", data, "5-way 1-shot", measure([value] * 4), CLEAN, "episodes"), arm, seed=seed)


def test_differences_and_marks_have_the_spread_of_the_seeds_that_the_rows_have(folder):
    """Every episode gains 0.1, so that episodes alone show no tie; the trainings gain 0.3 and -0.1."""
    with_trainings(folder, "digits", "frozen", [0.5, 0.5])
    with_trainings(folder, "digits", "adapted", [0.8, 0.4])
    clean = comparisons(folder)["digits", "clean"]
    # no spread over episodes; standard error of .3 and -.1: .2; t at one degree of freedom 12.7062
    assert difference(clean) == pytest.approx((0.1, 0.1 - 12.7062 * 0.2, 0.1 + 12.7062 * 0.2), abs=1e-4)
    assert clean.cells["frozen"].mark == "tie" and clean.paired and clean.cells["adapted"].seeds == 2


def test_trainings_of_other_seeds_are_independent(folder):
    """Of seeds 0, 1 and 5, 6: the spread is that of both arms, not of differences of trainings that do not belong together."""
    with_trainings(folder, "digits", "frozen", [0.4, 0.6])
    with_trainings(folder, "digits", "adapted", [0.5, 0.7], first=5)
    # variance of a mean .02 / 2 = .01 each, one degree of freedom each
    half = 12.7062 * math.sqrt(0.02)
    assert difference(comparisons(folder)["digits", "clean"]) == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-4)


def test_beside_a_model_without_trainings_the_spread_is_that_of_the_other(folder):
    with_trainings(folder, "digits", "adapted", [0.4, 0.8])
    clean = comparisons(folder)["digits", "clean"]
    assert difference(clean)[2] - difference(clean)[0] == pytest.approx(12.7062 * 0.2, abs=1e-4)
    assert (clean.cells["frozen"].seeds, clean.cells["adapted"].seeds) == (0, 2)


def test_a_seed_moves_all_sets_of_an_average_together(folder):
    """Seeds that are good on both sets spread their average; seeds that are good on one set each do not."""
    with_trainings(folder, "digits", "adapted", [0.5, 0.7])
    with_trainings(folder, "crops", "adapted", [0.425, 0.625])
    row = comparisons(folder)["average", "clean"]
    # over episodes: squares of .253 and of crops' deviations .05063 + .03063 + .03063 + .05063 = .1625, /12; seeds .4625, .6625
    examples = math.sqrt(0.2 / 12 + 0.1625 / 12) / 2
    wide = by_two_seeds(examples, 2 * 3 * (0.2 + 0.1625) ** 2 / (2 * (0.2**2 + 0.1625**2)))
    cell = row.cells["adapted"]
    assert cell.high == 1.0 and cell.low == pytest.approx(max(0.0, 0.5625 - wide), rel=1e-3)
    steps = by_two_seeds(0.0866 / 4, 3)
    assert difference(row) == pytest.approx((0.0625, 0.0625 - steps, 0.0625 + steps), rel=1e-3)
    other = comparisons_of(folder, "crops", [0.625, 0.425])["average", "clean"]
    assert half(other.cells["adapted"]) == pytest.approx(student.ppf(0.975, 5.9366) * examples, rel=1e-3)


def by_two_seeds(examples, freedom):
    """The half width for an error over examples and two seeds of error .1 (Cochran's weighted quantile)."""
    quantiles = examples**2 * student.ppf(0.975, freedom) + 0.1**2 * 12.7062
    return quantiles / math.hypot(examples, 0.1)


def comparisons_of(folder, data, scores):
    """Comparisons after other trainings took the place of an arm's on one set."""
    rows = [row for row in rows_of(folder) if row["seed"] is None or row["data"] != data]
    write_lines(folder / "results.jsonl", rows)
    with_trainings(folder, data, "adapted", scores)
    return comparisons(folder)


def test_without_records_an_average_has_the_errors_of_its_rows(folder):
    with_records = half(comparisons(folder)["average", "clean"].cells["adapted"])
    shutil.rmtree(folder / "records")
    assert half(comparisons(folder)["average", "clean"].cells["adapted"]) == pytest.approx(with_records)


def test_other_protocols_metrics_and_units_are_other_blocks(folder):
    add_arm(folder, "digits", "frozen", FROZEN, FROZEN, protocol="5-way 5-shot")
    blocks = [c.block for c in compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder))]
    assert list(dict.fromkeys(blocks)) == [
        ("few-shot", "5-way 1-shot", "accuracy", "episodes"),
        ("few-shot", "5-way 5-shot", "accuracy", "episodes"),
    ]
    # 2 sets and their average, clean and attacked, then one set
    assert len(blocks) == 8


def test_parts_of_the_examples_are_in_rows_averages_and_differences(tmp_path):
    """Episodes 0, 2 and 1, 3 belong together: with parts, two means are compared, not four values."""
    values = {"frozen": [0.1, 0.7, 0.3, 0.5], "adapted": [0.3, 0.8, 0.3, 0.7]}  # part means .2, .6 and .3, .75
    for data in ("digits", "crops"):
        for arm, of_arm in values.items():
            add(
                tmp_path,
                Score("few-shot", data, "p", measure(of_arm, groups=PARTS, covers="images", scale="number"), CLEAN),
                arm,
            )
    results = comparisons(tmp_path)
    digits, average = results["digits", "clean"], results["average", "clean"]
    assert half(digits.cells["frozen"]) == pytest.approx(12.7062 * 0.2, rel=1e-4)
    assert digits.cells["frozen"].covers == digits.differences["adapted"].covers == "images"
    # differences .2, .1, 0, .2: part means .1, .15, error .025
    difference = digits.differences["adapted"]
    assert (difference.mean, difference.half) == pytest.approx((0.125, 12.7062 * 0.025), rel=1e-4)
    assert half(average.cells["frozen"]) == pytest.approx(student.ppf(0.975, 2) * 0.2 / math.sqrt(2))
    assert not any("new domains" in note for note in notes(results))  # of two sets


def test_five_sets_have_an_interval_over_sets_too(tmp_path):
    for number in range(5):
        for arm, gain in (("frozen", 0.0), ("adapted", 0.1 * number)):
            values = [0.2 + gain, 0.3 + gain]
            add(tmp_path, Score("few-shot", f"set{number}", "p", measure(values), CLEAN, "episodes"), arm)
    results = comparisons(tmp_path)
    assert results["average", "clean"].differences["adapted"].mean == pytest.approx(0.2)
    # ± 2.776445 * 0.1581139 / sqrt 5 = ± .1963
    means, differences = notes(results)
    assert means.endswith("clean, frozen [25.0, 25.0], adapted [25.4, 64.6].")
    assert differences.endswith("clean, adapted [+0.4, +39.6].")


def test_many_corruptions_have_a_mean_that_is_paired_by_example(tmp_path):
    """Each example averaged over its corruptions, so that what they do alike to one image is in the interval."""
    shift = {"fog": 0.0, "blur": 0.1, "snow": 0.2, "noise": 0.3}
    for arm, gain in (("plain", 0.0), ("robust", 0.1)):
        for name, drop in shift.items():
            values = [0.4 - drop + gain, 0.6 - drop + gain, 0.8 - drop + 2 * gain]
            add(tmp_path, Score("few-shot", "x", "p", measure(values), corruption(name, 3), "episodes"), arm)
    found = {
        c.condition: c for c in compare_results(read_results(tmp_path / "results.jsonl"), ValuesByExample(tmp_path))
    }
    mean = found["mean of 4 corruptions"]
    assert mean.cells["plain"].value == pytest.approx(0.45) and mean.row.kind == "corruptions"
    # the corruptions shift all examples alike, so that the mean is as uncertain as one of them
    assert half(mean.cells["plain"]) == pytest.approx(half(found["fog 3"].cells["plain"]))
    assert mean.differences["robust"].mean == pytest.approx(0.4 / 3)
    assert mean.differences["robust"].half == pytest.approx(found["fog 3"].differences["robust"].half)
    rows = [row for row in read_results(tmp_path / "results.jsonl") if row.condition != "snow 3"]
    assert not any("mean" in c.condition for c in compare_results(rows, ValuesByExample(tmp_path)))


def test_the_mean_over_corruptions_has_the_mean_bias_in_any_order(tmp_path):
    """One corruption with a large bias and three with a small one: the interval is that of the mean bias."""
    biases = [(0.08, 0.04), (0.01, 0.005), (0.01, 0.005), (0.01, 0.005)]
    found = []
    for order in (biases, biases[::-1]):
        folder = tmp_path / str(len(found))
        for number, bias in enumerate(order):
            error = Estimate(0.2, ((0.0004, 11.0),), bias=bias)
            of = replace(measure([0.1, 0.2, 0.3]), error=error, paired=False, better="lower")
            for arm in ("plain", "robust"):
                add(folder, Score("few-shot", "x", "p", of, corruption(f"c{number}", 3), "episodes"), arm)
        rows = compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder))
        found += [c.cells["plain"] for c in rows if c.condition == "mean of 4 corruptions"]
    first, last = found
    half_width = (
        student.ppf(0.975, 11) * 0.02
    )  # without values by example, the variance of the mean is at most that of one
    assert (first.low, first.high) == pytest.approx((last.low, last.high))
    assert (first.low, first.high) == pytest.approx((0.2 - 0.0275 - half_width, 0.2 - 0.01375 + half_width))


def test_differences_are_to_the_baseline_of_the_task(folder):
    add_arm(folder, "digits", "third", [0.3, 0.5, 0.7, 0.9], FROZEN)

    def base(**options):
        c = next(c for c in compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder), **options))
        return c.base, list(c.differences)

    assert base() == ("adapted", ["third"])  # the first that is no reference
    assert base(references=["frozen", "third"]) == ("frozen", ["adapted"])
    assert base(baselines={"few-shot": "third"}) == ("third", ["adapted"])
    assert base(baselines={"few-shot": ""})[1] == [] == base(baselines={"few-shot": "gone"})[1]
    assert base(references=["frozen", "adapted", "third"]) == ("frozen", ["adapted", "third"])
    # a condition that the baseline lacks has no differences, and no other baseline
    for arm in ("third", "frozen"):
        add(folder, Score("few-shot", "digits", "5-way 1-shot", measure([0.5] * 4), PGD_2, "episodes"), arm)
    found = compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder))
    assert {c.base for c in found} == {"adapted"} and not next(c for c in found if c.condition == "PGD-2").differences


def test_a_value_outside_its_interval_has_its_reason_and_no_star(tmp_path):
    """A calibration error of 7 % with a bias of 4 to 5 points: its interval ends below it."""
    rows = []
    for arm, value in (("a", 0.07), ("b", 0.09)):
        error = Estimate(value, ((0.005**2, 99.0),), bias=(0.05, 0.04))
        score = Score(
            "c", "digits", "test", measure([value] * 100, "ECE-15", better="lower", error=error, paired=False), CLEAN
        )
        rows.append(add(tmp_path, score, arm))
    (c,) = compare_results(rows, ValuesByExample(tmp_path))
    assert c.cells["a"].value > c.cells["a"].high and {cell.mark for cell in c.cells.values()} == {""}
    ((table, note),) = result_tables([c])
    assert (
        table.rows == [["digits (unpaired)", "7.0, bias-corrected [1.0, 4.0]", "9.0, bias-corrected [3.0, 6.0]"]]
        and not table.best
    )
    assert "Bias-corrected: " in note
    # inside its interval it has its star, and no word
    rows = [replace(row, low=0.0) for row in rows]
    (c,) = compare_results([replace(row, high=0.2) for row in rows], ValuesByExample(tmp_path))
    assert [cell.mark for cell in c.cells.values()] == ["best", "tie"]
    assert "orrected" not in str(result_tables([c]))


def test_the_difference_of_any_two_arms_is_at_hand(folder):
    for arm in ("clean", "frozen:late"):
        add_arm(folder, "digits", arm, [value + 0.3 for value in FROZEN], FROZEN)
    c = comparisons(folder)["digits", "clean"]
    assert c.pair("adapted", "frozen").mean == pytest.approx(0.1) and c.pair(
        "frozen", "clean model"
    ).mean == pytest.approx(-0.3)
    for path in (folder / "records").glob("*adapted*"):
        path.unlink()
    c = comparisons(folder)["digits", "clean"]
    assert c.pair("adapted", "frozen") is None
