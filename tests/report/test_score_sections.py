"""The shared sections of a study from hand-made files: by seed, paired differences, rates, merging, levels, curves."""

import math

import pytest
from helpers.readable import assert_readable, visible_texts
from helpers.results import PGD, add, corruption, measure, result, rows_of, write_lines

from vismt.engine.study import chosen_trainings
from vismt.report.comparison import compare_results
from vismt.report.results import ValuesByExample, read_results
from vismt.report.score_sections import arm_scores, score_sections
from vismt.report.trainings import training_sections
from vismt.storage.files import sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import CLEAN, Condition, Score

DEPTH, EDGE, DELTA = "RMSE in m", "odsF", "over alone+edge in per cent"
METRICS = {"depth": DEPTH, "edge": EDGE, "delta_m": DELTA}
BASELINES = {"depth": "alone", "edge": "edge"}
LOGGED = {"loss": "Training loss of all tasks", "depth": "depth: training loss", "edge": "edge: training loss"}
ARMS = ["alone", "emtal", "edge"]
T = 12.7062  # Student's t of 0.975 at one degree of freedom: half width = T * |a - b| / 2 of two values
PSI = {"alone": [2.0, 2.1, 2.2], "emtal": [1.0, 1.3, 1.3]}
VALUES = {
    ("alone", "depth"): (2.0, 2.2),
    ("emtal", "depth"): (1.0, 1.4),
    ("edge", "edge"): (0.5, 0.52),
    ("emtal", "edge"): (0.56, 0.54),
    ("emtal", "delta_m"): (30.0, 20.0),
}


def score(task, values):
    settings = {"scale": "share" if task == "edge" else "number", "better": "lower" if task == "depth" else "higher"}
    return Score(task, "rooms", "test", measure(values, METRICS[task], **settings), CLEAN)


@pytest.fixture
def folder(tmp_path):
    """Two seeds; depth is compared with the arm "alone", edge with the arm "edge"; three images with a depth, four with edges."""
    for (arm, task), values in VALUES.items():
        images = PSI[arm] if task == "depth" else [sum(values) / 2] * 4
        add(tmp_path, score(task, images), arm)
        for seed, value in enumerate(values):
            add(tmp_path, score(task, [value] * len(images)), arm, seed=seed)
    return tmp_path


def sections(folder, arms=ARMS, baselines=BASELINES, logged=LOGGED, seed=0):
    results, values = read_results(folder / "results.jsonl"), ValuesByExample(folder)
    scores = score_sections(folder, results, compare_results(results, values, baselines), values, arms)
    return {section.title: section for section in [*scores, *training_sections(folder, arms, seed, logged)]}


def tables(folder, **options):
    return {table.title: table for section in sections(folder, **options).values() for table, _ in section.tables}


def test_by_seed_with_the_difference_to_the_arm_of_the_task(folder):
    table = tables(folder)["By seed, 2 seeds"]
    assert table.heads == ["Score", "Model", "seed 0", "seed 1", "mean", "difference"]
    assert table.rows == [
        [f"depth: {DEPTH} ↓", "alone", "2.0", "2.2", "2.1 ± 1.3", "–"],  # T * 0.1
        [f"depth: {DEPTH} ↓", "emtal", "1.0", "1.4", "1.2 ± 2.5", "−0.9 ± 1.3 to alone"],  # -1, -0.8
        [f"edge: {EDGE} in % ↑", "edge", "50.0", "52.0", "51.0 ± 12.7", "–"],
        [f"edge: {EDGE} in % ↑", "emtal", "56.0", "54.0", "55.0 ± 12.7", "+4.0 ± 25.4 to edge"],  # 6, 2
        [f"delta_m: {DELTA} ↑", "emtal", "30", "20", "25 ± 64", "–"],
    ]
    assert pytest.approx(T * 0.1, abs=0.05) == 1.3 and table.texts == 2
    assert table.best == {(1, 4), (3, 4)}  # the lowest error, the highest F; delta_m has one arm
    ((_, note),) = sections(folder)["Models by seed"].tables
    assert "↓ lower is better" in note and "Student's t" in note


def test_three_seeds_by_student_t(tmp_path):
    for arm, values in (("lora", (0.5, 0.6, 0.7)), ("emtal", (0.6, 0.8, 0.7))):
        add(tmp_path, score("edge", [sum(values) / 3] * 2), arm)
        for seed, value in zip((7, 3, 5), values):
            add(tmp_path, score("edge", [value] * 2), arm, seed=seed)
    table = tables(tmp_path, arms=["lora", "emtal"], baselines={})["By seed, 3 seeds"]
    assert table.heads[2:5] == ["seed 7", "seed 3", "seed 5"]  # in the order of the study
    # t of 0.975 at two degrees of freedom 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484; differences .1, .2, 0 likewise
    assert table.rows[0][-2] == "60.0 ± 24.8" and table.rows[1][-1] == "+10.0 ± 24.8 to lora"


def test_without_a_baseline_the_first_arm_of_a_task_is_the_other(folder):
    table = tables(folder, baselines={})["By seed, 2 seeds"]
    assert [row[-1] for row in table.rows] == ["–", "−0.9 ± 1.3 to alone", "–", "+4.0 ± 25.4 to edge", "–"]


def test_pairs_are_the_later_arm_minus_the_earlier(folder):
    both = tables(folder)["Paired differences"]
    assert both.folded and both.heads == [
        "Models",
        f"depth: {DEPTH} ↓, n = 3",
        f"edge: {EDGE} in % ↑, n = 4",
        f"delta_m: {DELTA} ↑, n = 4",
    ]
    # Images: -1, -0.8, -0.9, standard error .0577; seeds: -1, -0.8, standard error .1. t(2) = 4.303 and t(1) = 12.706,
    # weighted by the variances, 10.605, * .1155 = 1.22. Edges: no spread over images, seeds -6 and -2. Depth has no edge arm.
    assert both.rows == [
        ["emtal − alone", "−0.9 [−2.1, +0.3]", "–", "–"],
        ["edge − emtal", "–", "−4.0 [−29.4, +21.4]", "–"],
    ]


def test_pairs_are_shown_under_attacks_too(tmp_path):
    """Equal on clean images and not under attack, on two sets; of many corruptions none."""
    values = {CLEAN: ([0.5, 0.7], [0.5, 0.7]), PGD: ([0.1, 0.3], [0.4, 0.6])}
    values |= {corruption("fog", severity): ([0.1, 0.3], [0.1, 0.3]) for severity in (1, 2, 3, 4)}
    for data in ("digits", "crops"):
        for condition, arms in values.items():
            for arm, of_arm in zip(("plain", "robust", "clean"), (*arms, arms[0])):
                add(tmp_path, Score("few-shot", data, "5-way 1-shot", measure(of_arm), condition, "episodes"), arm)
    add(tmp_path, Score("few-shot", "digits", "5-way 1-shot", measure([0.2, 0.2]), CLEAN, "episodes"), "frozen")
    table = tables(tmp_path, arms=["plain", "robust", "clean"])["Paired differences"]
    names = [f"{data}: accuracy in % ↑, n = {n}" for data, n in (("digits", 2), ("crops", 2), ("average", 4))]
    assert table.heads == ["Models", "Condition", *names] and table.texts == 2
    assert table.rows[:2] == [
        ["robust − plain", "clean", *["0.0 [−65.8, +65.8]"] * 2, "0.0 [−46.5, +46.5]"],
        ["robust − plain", PGD.label, *["+30.0 [+30.0, +30.0]"] * 3],
    ]
    assert {row[0] for row in table.rows} == {"robust − plain", "clean model − plain", "clean model − robust"}


def test_arms_with_other_images_are_not_paired(folder):
    path = folder / "records" / "depth-rooms-test-alone-RMSE-in-m.jsonl"
    rows = read_lines(path)
    write_lines(path, [{**row, "example": row["example"].replace("2", "7")} for row in rows])
    assert [row[1] for row in tables(folder)["Paired differences"].rows] == ["–"]
    write_lines(
        path, [{**row, "clean": row["clean"] + 0.2 * (row["clean"] == 2.1)} for row in rows]
    )  # nor where records give another number
    assert "emtal − alone" not in [row[0] for row in tables(folder)["Paired differences"].rows]


def test_one_seed_has_no_spread(folder):
    write_lines(folder / "results.jsonl", [row for row in rows_of(folder) if row["seed"] is None])
    assert list(tables(folder)) == ["Paired differences"]
    assert not sections(folder)["Models by seed"].pictures
    # of two models the table of differences has the only one
    assert list(tables(folder, arms=["alone", "emtal"])) == []


def test_an_arm_that_lacks_a_seed_is_left_out_by_seed(folder):
    rows = [row for row in rows_of(folder) if (row["arm"], row["task"], row["seed"]) != ("emtal", "depth", 0)]
    write_lines(folder / "results.jsonl", rows)
    table = tables(folder)["By seed, 2 seeds"]
    assert [row[1] for row in table.rows] == ["alone", "edge", "emtal", "emtal"]


def test_no_files_no_sections(tmp_path):
    assert not any(section.tables or section.pictures for section in sections(tmp_path).values())


# ---- scores of arms


def test_the_average_is_over_the_sets_of_a_seed():
    rows = [
        result(data, arm, value=value, seed=seed, n=10)
        for data, arm, seed, value in (
            ("x", "a", None, 0.6), ("y", "a", None, 0.5), ("x", "b", None, 0.6), ("y", "b", None, 0.2),
            ("x", "a", 0, 0.5), ("x", "a", 1, 0.7), ("y", "a", 0, 0.9), ("y", "a", 1, 0.1),
            ("x", "b", 0, 0.6), ("x", "b", 1, 0.6), ("y", "b", 0, 0.2),
        )
    ]  # fmt: skip
    rows.append(result("x", "b", PGD, value=0.0, n=10))
    rows.append(result("x", "frozen", value=0.1))
    x, y, average, attacked = arm_scores(rows, {"a": "a", "b": "b"})
    assert (attacked.data, attacked.row.condition, list(attacked.arms)) == (
        "x",
        PGD.label,
        ["b"],
    )  # of one set no average
    assert [score.data for score in (x, y, average)] == ["x", "y", "average"]
    assert x.seeds == {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.6, ("b", 1): 0.6}  # clean alone
    # a: ((50 + 90) / 2, (70 + 10) / 2); b has seed 0 of y alone, so that it has no mean of another seed
    assert average.seeds == {("a", 0): pytest.approx(0.7), ("a", 1): pytest.approx(0.4), ("b", 0): pytest.approx(0.4)}
    assert {arm: [row.data for row in rows] for arm, rows in average.arms.items()} == {"a": ["x", "y"], "b": ["x", "y"]}
    assert (x.count, average.count) == ("10", "20") and "frozen" not in x.arms


def test_an_arm_without_one_of_the_sets_has_no_average():
    rows = [result("x", "a"), result("y", "a", n=40), result("x", "b")]
    assert list(arm_scores(rows, {"a": "a", "b": "b"})[-1].arms) == ["a"]
    assert [score.data for score in arm_scores(rows[1:], {"a": "a", "b": "b"})] == ["y", "x"]  # no arm has both


def test_names_tell_scores_apart():
    def names(*rows):
        return [score.name for score in arm_scores(rows, {"frozen": "frozen"})]

    assert names(result("x")) == ["x"] and names(result("x"), result("y")) == ["x", "y", "average"]
    semseg = result("rooms", task="semseg", metric="mIoU")
    assert names(semseg, result("rooms", task="parts", metric="mIoU")) == ["semseg", "parts"]
    assert names(result("x", task="a"), result("y", task="b")) == ["a, x", "b, y"]
    shots = [result("x", protocol=f"5-way {n}-shot") for n in (1, 5)]
    assert names(*shots) == ["x, 5-way 1-shot", "x, 5-way 5-shot"]


# ---- rates, merging


def test_rates_and_merging(folder):
    for arm, validation in (("alone", {"0.1": 1.23456, "0.3": None}), ("emtal", {"0.1": 0.5, "0.03": 0.25})):
        path = folder / "arms" / arm / "chosen.json"
        path.parent.mkdir(parents=True)
        path.write_text(sealed({"lr": 0.1, "validation": validation}))
    check = {"n": 4, "different_predictions": 3, "largest_difference": 1e-5, "largest_logit": 2.0}
    for seed, difference in ((0, 1e-5), (1, 1e-6)):
        path = folder / "arms" / "emtal" / f"lr-0.1-seed-{seed}" / "merge.json"
        path.parent.mkdir(parents=True)
        path.write_text(sealed({**check, "largest_difference": difference}))
    all_tables = tables(folder)
    rates = all_tables["Choice of the rate"]
    assert rates.heads == ["Arm", "0.03", "0.1", "0.3", "chosen"] and rates.best == {(0, 2), (1, 2)}
    assert rates.rows == [["alone", "–", "1.235", "diverged", "0.1"], ["emtal", "0.25", "0.5", "–", "0.1"]]
    # two trainings, 4 images each; the larger of 1e-5 / 2 and 1e-6 / 2
    assert all_tables["Merged and unmerged"].rows == [["emtal", "2", "8", "6", "5.0e-06"]]


def test_an_arm_whose_rate_was_not_chosen_has_no_table(folder):
    (folder / "arms" / "alone").mkdir(parents=True)
    (folder / "arms" / "alone" / "chosen.json").write_text(sealed({"lr": 0.1, "validation": {}}))
    assert "Choice of the rate" not in tables(folder)


# ---- pictures


def write_log(folder, arm, seed, first=1.0, lr=0.1):
    rows = [
        {"step": s, "loss": first * 9 / s, "depth": 1 / s, "edge": None if arm == "alone" else 2 / s}
        for s in range(1, 9)
    ]
    write_lines(folder / "arms" / arm / f"lr-{lr:g}-seed-{seed}" / "metrics.jsonl", rows)
    (folder / "arms" / arm / "chosen.json").write_text(sealed({"lr": 0.1, "validation": {}}))


def test_seeds_and_curves_can_be_read(folder, drawn):
    for arm in ("alone", "emtal"):
        write_log(folder, arm, 0)
    shown = sections(folder)
    assert [picture.title for picture in shown["Models by seed"].pictures] == ["Models by seed"]
    assert [picture.title for picture in shown["Training"].pictures] == ["Training"]
    for figure in drawn:
        assert_readable(figure)
    by_seed, curves = drawn[-2:]
    texts = {text for text, _ in visible_texts(by_seed)}
    assert {"depth", "RMSE in m ↓, n = 3", "edge", "odsF in % ↑, n = 4", "2.1", "1.2", "55.0", "25"} <= texts
    depth, edge, delta = by_seed.axes
    # The arms keep their place and colour in every panel; one without the task leaves it empty.
    assert depth.lines[0].get_ydata() == pytest.approx([2.0, 1.0, math.nan], nan_ok=True)
    assert edge.lines[1].get_ydata() == pytest.approx([math.nan, 54.0, 52.0], nan_ok=True)
    assert delta.lines[0].get_ydata() == pytest.approx([math.nan, 30.0, math.nan], nan_ok=True)
    assert [axes.get_title(loc="left") for axes in curves.axes] == list(LOGGED.values())
    assert [len(axes.lines) for axes in curves.axes] == [4, 4, 2]


def test_curves_are_those_of_the_first_seed_and_the_chosen_rate(tmp_path, drawn):
    """Also where no row has a seed, as of folds, and where the files of another rate are there."""
    add(tmp_path, score("edge", [0.5, 0.5]), "emtal")
    for seed in (10, 9):
        write_log(tmp_path, "emtal", seed, first=seed)
    write_log(tmp_path, "emtal", 10, first=99.0, lr=0.01)
    for seed in (10, 9):
        sections(tmp_path, arms=["emtal"], seed=seed)
        assert drawn[-1].axes[0].lines[0].get_ydata()[0] == 9 * seed
    assert list(chosen_trainings(tmp_path, "emtal")) == [9, 10]


def test_a_lone_training_has_a_curve(tmp_path, drawn):
    add(tmp_path, score("edge", [0.5, 0.5]), "emtal")
    write_log(tmp_path, "emtal", 4)
    assert sections(tmp_path, arms=["emtal"], seed=4)["Training"].pictures


def condition(severity=None, radius=None):
    if severity is not None:
        return corruption("fog", severity)
    return Condition(f"PGD-10 linf {radius}/255", "attack", "PGD linf", radius / 255)


def levels(folder, data, conditions):
    for label in (CLEAN, *conditions):
        for arm, values in (("frozen", [0.2, 0.4]), ("adapted", [0.3, 0.5])):
            add(folder, Score("few-shot", data, "5-way 1-shot", measure(values), label, "episodes"), arm)
    return sections(folder, arms=["adapted"])["Scores by level"].pictures


def test_levels_of_corruptions_and_attacks(tmp_path):
    assert levels(tmp_path / "one", "digits", [condition(1), PGD]) == []
    fog = [condition(severity) for severity in (1, 2, 3, 4)]
    (picture,) = levels(tmp_path / "fog", "digits", fog)
    assert picture.title == "digits, corruption by severity" and picture.path.exists()
    assert "5-way 1-shot, digits, accuracy in %, n = 2 episodes" in picture.caption
    attacks = [condition(radius=radius) for radius in (2, 8)]
    pictures = levels(tmp_path / "both", "digits", [*fog, *attacks])
    assert [picture.title for picture in pictures] == [
        "digits, corruption by severity",
        "digits, attack by radius in [0, 1]",
    ]
    assert len({picture.path for picture in pictures}) == 2


def test_levels_of_several_sets_are_those_of_their_average(tmp_path):
    fog = [condition(severity) for severity in (1, 2, 3, 4)]
    levels(tmp_path, "digits", fog)
    (picture,) = levels(tmp_path, "crops", fog)
    assert "average over the sets" in picture.caption and "n = 4 episodes" in picture.caption and picture.path.exists()


def test_only_families_with_several_levels_are_drawn(tmp_path, drawn):
    levels(
        tmp_path, "digits", [condition(radius=2), condition(radius=8), Condition("FGSM", "attack", "FGSM linf", 0.1)]
    )
    (axes,) = [axes for axes in drawn[-1].axes if axes.get_xlabel() == "radius in [0, 1]"]
    assert axes.get_title(loc="left") == "PGD linf" and len(axes.lines[0].get_ydata()) == 3  # clean, 2, 8
