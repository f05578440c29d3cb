"""The report of a dense run from hand-made files: tables by hand, figures that can be read, panels that are checked."""

import json
import math

import numpy as np
import pytest
from helpers.readable import assert_readable, visible_texts

from vismt.errors import UserError
from vismt.jobs.dense.figures import predictions_figure
from vismt.jobs.dense.report import dense_curves, dense_panels, dense_tables
from vismt.report.comparison import Cell, Comparison
from vismt.report.figures import domain_bars
from vismt.report.panels import read_panel, write_panel
from vismt.report.plotting import color_of

DEPTH, EDGE, DELTA = "depth RMSE in m", "edge odsF", "delta_m over alone+edge in per cent"
T = 12.7062  # Student's t of 0.975 at one degree of freedom: half width = T * |a - b| / 2 of two values
PSI = {"alone": [2.0, 2.1, 2.2], "emtal": [1.0, 1.3, 1.3]}
VALUES = {
    ("alone", "depth"): (2.0, 2.2),
    ("emtal", "depth"): (1.0, 1.4),
    ("edge", "edge"): (0.5, 0.52),
    ("emtal", "edge"): (0.56, 0.54),
    ("emtal", "delta_m"): (30.0, 20.0),
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Two seeds; depth is compared with the arm "alone", edge with the arm "edge"; three images with a depth, four with edges."""
    metrics = {"depth": DEPTH, "edge": EDGE, "delta_m": DELTA}
    lines, rows = [], []
    for (arm, task), values in VALUES.items():
        lines += [
            {"arm": arm, "seed": seed, "lr": 0.1, "task": task, "value": value, "n": 3}
            for seed, value in enumerate(values)
        ]
        images = PSI[arm] if task == "depth" else [sum(values) / 2] * 4
        rows.append(
            {
                "data": "rooms",
                "protocol": "test",
                "condition": "clean",
                "metric": metrics[task],
                "model": arm,
                "value": sum(images) / len(images),
                "n": len(images),
                "lower_is_better": task == "depth",
            }
        )
        write(
            tmp_path / "records" / f"rooms-test-{arm}-{task}.jsonl",
            [{"episode": f"image {i}", "clean": psi} for i, psi in enumerate(images)],
        )
    write(tmp_path / "dense_seeds.jsonl", lines)
    write(tmp_path / "results.jsonl", rows)
    (tmp_path / "config.resolved.yaml").write_text("baseline: {depth: alone, edge: edge}\n")
    return tmp_path


def tables(folder):
    return {table.title: table for table, _ in dense_tables(folder)}


def test_by_seed_with_the_difference_to_the_arm_of_the_task(folder):
    table = tables(folder)["By seed, 2 seeds"]
    assert table.heads == ["Score", "Arm", "seed 0", "seed 1", "mean", "− baseline"]
    assert table.rows == [
        [f"{DEPTH} ↓", "alone", "2", "2.2", "2.1 ± 1.3", "–"],  # T * 0.1
        [f"{DEPTH} ↓", "emtal", "1", "1.4", "1.2 ± 2.5", "−0.9 ± 1.3"],  # -1, -0.8
        [f"{EDGE} in % ↑", "edge", "50.0", "52.0", "51.0 ± 12.7", "–"],
        [f"{EDGE} in % ↑", "emtal", "56.0", "54.0", "55.0 ± 12.7", "+4.0 ± 25.4"],  # 6, 2
        [f"{DELTA} ↑", "emtal", "30", "20", "25.0 ± 63.5", "–"],
    ]
    assert table.best == {(1, 4), (3, 4)}  # the lowest error, the highest F; delta_m has one arm
    (note,) = (note for table, note in dense_tables(folder) if table.title.startswith("By seed"))
    assert "depth: alone, edge: edge" in note and "↓ lower is better" in note


def test_without_a_baseline_the_first_arm_of_a_task_is_the_other(folder):
    (folder / "config.resolved.yaml").write_text("baseline: null\n")
    table = tables(folder)["By seed, 2 seeds"]
    assert table.heads[-1] == "− first arm" and [row[-1] for row in table.rows] == [
        "–",
        "−0.9 ± 1.3",
        "–",
        "+4.0 ± 25.4",
        "–",
    ]


def test_pairs_are_the_later_arm_minus_the_earlier_one(folder):
    found = tables(folder)
    images, seeds = found["Paired differences over images"], found["Paired differences over 2 seeds"]
    assert images.heads == ["Arms", f"{DEPTH} ↓, n = 3", f"{EDGE} in % ↑, n = 4", f"{DELTA} ↑, n = 4"]
    # -1, -0.8, -0.9 have deviation 0.1: 1.96 * 0.1 / sqrt(3) = 0.113; edge - alone has no task in common
    assert images.rows == [["emtal − alone", "−0.90 ± 0.11", "–", "–"], ["edge − emtal", "–", "−4.0 ± 0.0", "–"]]
    assert [row[1] for row in seeds.rows] == ["−0.9 ± 1.3", "–"]
    assert not seeds.heads[1].endswith("n = 3")


def test_arms_with_other_images_are_not_paired(folder):
    path = folder / "records" / "rooms-test-alone-depth.jsonl"
    path.write_text(path.read_text().replace("image 2", "image 7"))
    assert [row[1] for row in tables(folder)["Paired differences over images"].rows] == ["–"]
    path.write_text(
        path.read_text().replace("image 7", "image 2").replace("2.1", "2.3")
    )  # nor where records give another number
    assert "emtal − alone" not in [row[0] for row in tables(folder)["Paired differences over images"].rows]


def test_one_seed_has_no_spread_and_a_lacking_one_is_told(folder):
    lines = (folder / "dense_seeds.jsonl").read_text().splitlines()
    write(folder / "dense_seeds.jsonl", [json.loads(line) for line in lines if '"seed": 0' in line])
    assert list(tables(folder)) == ["Paired differences over images"]
    write(folder / "dense_seeds.jsonl", [json.loads(line) for line in lines[1:]])
    with pytest.raises(UserError, match=r"dense_seeds.jsonl lacks a seed or an arm of depth; `vismt evaluate"):
        dense_tables(folder)
    (folder / "dense_seeds.jsonl").unlink()
    assert dense_tables(folder) == [] == dense_curves(folder) == dense_panels(folder)


def test_rates_and_merging(folder):
    for arm, scores in (("alone", {"0.1": 1.23456, "0.3": None}), ("emtal", {"0.1": 0.5, "0.03": 0.25})):
        path = folder / "arms" / arm / "chosen.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"lr": 0.1, "validation": scores}))
    told = {
        "n": 4,
        "different_predictions": 3,
        "largest_difference": 1e-5,
        "largest_logit": 2.0,
        "tasks": {"depth": [0, 1, 0]},
    }
    for seed, tasks in ((0, {"depth": []}), (1, {"depth": []})):
        path = folder / "arms" / "emtal" / f"lr-0.1-seed-{seed}" / "merge.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**told, "tasks": tasks}))
    found = tables(folder)
    rates = found["Choice of the rate"]
    assert rates.heads == ["Arm", "0.03", "0.1", "0.3", "chosen"] and rates.best == {(0, 2), (1, 2)}
    assert rates.rows == [["alone", "–", "1.235", "diverged", "0.1"], ["emtal", "0.25", "0.5", "–", "0.1"]]
    assert found["Merging"].rows == [["emtal", "2", "8", "5.0e-06"]]  # no task has classes
    path.write_text(json.dumps({**told, "tasks": {"semseg": []}}))
    (folder / "arms" / "emtal" / "lr-0.1-seed-0" / "merge.json").unlink()
    merging = tables(folder)["Merging"]
    assert merging.heads[3] == "pixels whose class differs" and merging.rows == [["emtal", "1", "4", "3", "5.0e-06"]]


def test_seeds_and_curves_can_be_read(folder, drawn):
    for arm in ("alone", "emtal"):
        rows = [
            {"step": s, "loss": 9 / s, "depth": 1 / s, "edge": None if arm == "alone" else 2 / s} for s in range(1, 9)
        ]
        write(folder / "arms" / arm / "lr-0.1-seed-0" / "metrics.jsonl", rows)
    seeds, training = dense_curves(folder)
    assert [seeds.title, training.title] == ["Arms by seed", "Training"]
    for figure in drawn:
        assert_readable(figure)
    by_seed, curves = drawn
    texts = {text for text, _ in visible_texts(by_seed)}
    assert {"depth, n = 3", "RMSE in m ↓", "edge, n = 4", "odsF in % ↑", "2.1", "1.2", "55.0", "25.0"} <= texts
    depth, edge, delta = by_seed.axes
    # The arms keep their place and colour in every panel; one without the task leaves it empty.
    assert depth.lines[0].get_ydata() == pytest.approx([2.0, 1.0, math.nan], nan_ok=True)
    assert edge.lines[1].get_ydata() == pytest.approx([math.nan, 54.0, 52.0], nan_ok=True)
    assert delta.lines[0].get_ydata() == pytest.approx([math.nan, 30.0, math.nan], nan_ok=True)
    assert [axes.get_title(loc="left") for axes in curves.axes] == [
        "Training loss of all tasks",
        "depth: training loss",
        "edge: training loss",
    ]
    assert [len(axes.lines) for axes in curves.axes] == [4, 4, 2]


def test_an_arm_has_the_colour_of_its_place_among_all(drawn, tmp_path):
    from matplotlib.colors import to_rgba

    one = Comparison("rooms", "test", "clean", DEPTH, "images", 0, {"emtal": Cell(1.0, 0.1, 3)}, None, False, True)
    for order in (None, ["alone", "emtal"]):
        domain_bars([one], tmp_path / "a.png", order)
        (bar,) = drawn[-1].axes[0].patches
        assert bar.get_facecolor() == to_rgba(color_of("emtal", order or ["emtal"]))
        assert drawn[-1].legends[0].get_patches()[0].get_facecolor() == bar.get_facecolor()


# ---- panels
def panel(path, arms=("heads", "emtal"), count=2, size=(24, 32), **changes):
    generator = np.random.default_rng(0)

    def bytes_(*shape):
        return generator.integers(0, 255, (*shape, 3, *size), dtype=np.uint8)

    trained = np.ones((len(arms), 2), dtype=bool)
    trained[0, 1] = False
    scores = generator.uniform(0.1, 0.9, (len(arms), 2, count))
    scores[1, 0, 0] = math.nan
    return write_panel(
        path,
        "dense",
        {
            "images": bytes_(count),
            "ids": np.array([f"rooms:test/{i}_a_name_that_is_long.png" for i in range(count)]),
            "tasks": np.array(["depth", "edge"]),
            "metrics": np.array([DEPTH, EDGE]),
            "lower_is_better": np.array([True, False]),
            "truth": bytes_(2, count),
            "arms": np.array(arms),
            "trainings": np.array(list(arms)),
            "trained": trained,
            "predictions": bytes_(len(arms), 2, count),
            "scores": scores,
            **changes,
        },
    )


@pytest.mark.parametrize(
    ("arms", "count", "size"), [(2, 1, (24, 32)), (2, 4, (40, 32)), (7, 2, (24, 48)), (12, 2, (32, 32))]
)
def test_panels_can_be_read(drawn, tmp_path, arms, count, size):
    names = ["heads", "a_name_that_does_not_end_soon", *(f"lora-{i}" for i in range(10))][:arms]
    predictions_figure(panel(tmp_path / "a.npz", names, count, size), tmp_path / "a.png")
    assert_readable(drawn[0])
    assert drawn[0].get_size_inches()[0] <= 11.05
    # Input, truth of two tasks, and predictions but those of a task that the first arm does not train.
    assert len(drawn[0].axes) == count * (1 + 2 + 2 * arms - 1)


def test_every_picture_stands_at_its_name_with_its_own_score(drawn, tmp_path):
    found = read_panel(panel(tmp_path / "a.npz"), "dense")
    predictions_figure(tmp_path / "a.npz", tmp_path / "a.png")
    figure = drawn[0]
    places = {text: box for text, box in visible_texts(figure)}
    shown = {}
    for axes in figure.axes:
        box = axes.get_window_extent()
        shown[axes.images[0].get_array().tobytes()] = box

    def box_of(pixels):
        return shown[np.ascontiguousarray(np.moveaxis(pixels, 0, -1)).tobytes()]

    emtal = box_of(found["predictions"][1, 1, 0])
    (score,) = (box for text, box in places.items() if text == f"{100 * found['scores'][1, 1, 0]:.1f}")
    assert abs(score.x0 - emtal.x0) < 4 and 0 < emtal.y0 - score.y1 < 20
    truth, heads = box_of(found["truth"][1, 0]), box_of(found["predictions"][0, 0, 0])
    assert truth.x1 < heads.x0 < emtal.x0 and truth.y0 == pytest.approx(emtal.y0)
    assert heads.y0 == pytest.approx(box_of(found["images"][0]).y0) and heads.y0 > emtal.y1
    texts = [text for text, _ in visible_texts(figure)]
    assert texts.count("–") == 1 and texts.count("emtal") == 2 and texts.count(f"{EDGE} in % ↑") == 2


def test_files_that_do_not_fit(tmp_path):
    for number, (changes, words) in enumerate(
        [
            ({"scores": np.zeros((2, 2, 3))}, "needed 2 for n"),
            ({"trained": np.ones((2, 2), int)}, "trained is int64"),
            ({"truth": np.zeros((2, 2, 3, 24, 31), np.uint8)}, "needed 32 for w"),
            ({"ids": np.array([], str)}, "ids is"),
            ({"scores": np.zeros((2, 2, 2), np.float32)}, "scores is float32"),
        ]
    ):
        with pytest.raises(UserError, match=words):
            panel(tmp_path / f"{number}.npz", **changes)
    assert not list(tmp_path.iterdir())
    good = panel(tmp_path / "good.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(good[:300])
    np.savez(
        tmp_path / "pickle.npz", **{**dict(np.load(tmp_path / "good.npz")), "ids": np.array([{}, {}], dtype=object)}
    )
    for name in ("bad.npz", "pickle.npz", "none.npz"):
        with pytest.raises(UserError, match=f"{name}' is no panel of dense"):
            predictions_figure(tmp_path / name, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
