"""The pictures of a study: a score by arm and seed, and what was logged of the training."""

import math

import numpy as np
import pytest
from helpers.readable import assert_readable, visible_texts

from vismt.base.errors import UserError
from vismt.report.arm_figures import SeedsPanel, curves_figure, seeds_figure

ARMS = ["linear-probe", "lora-4", "emtal", "emtal-no-retain", "emtal-1", "a_name_that_does_not_end_soon", "b", "c"]
TASKS = ["cub", "flowers", "dogs-of-a-name-that-is-long", "cars", "aircraft", "digits", "average"]
TITLES = {"ce": "Training cross-entropy", "accuracy": "Training accuracy (%)", "fade": "Router fade"}


def texts(figure):
    return [text for text, _ in visible_texts(figure)]


# ---- seeds


@pytest.mark.parametrize(("arms", "panels", "seeds"), [(1, 1, 1), (2, 7, 3), (8, 7, 5)])
def test_seeds_can_be_read(drawn, tmp_path, arms, panels, seeds):
    values = np.random.default_rng(0).uniform(50, 100, (panels, arms, seeds))
    shown = [
        SeedsPanel(
            task,
            "accuracy in % ↑",
            "n = 12,345 to 12,346",
            {(arm, seed): values[t, a, seed] for a, arm in enumerate(ARMS[:arms]) for seed in range(seeds)},
            "share",
        )
        for t, task in enumerate(TASKS[:panels])
    ]
    path = seeds_figure(shown, ARMS[:arms], tmp_path / "a.svg")
    assert path.exists()
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == panels
    assert drawn[0].get_size_inches()[0] <= 9.6


def test_dots_of_a_seed_are_joined_and_bars_are_means(drawn, tmp_path):
    first = {("a", 0): 50.0, ("a", 1): 70.0, ("b", 0): 60.0, ("b", 1): 60.0}
    second = {("a", 0): 70.0, ("a", 1): 40.0, ("b", 0): 40.0}
    panels = [
        SeedsPanel("x", "accuracy in % ↑", "n = 12,345", first, "share"),
        SeedsPanel("average", "accuracy in % ↑", "n = 24,690", second, "share"),
    ]
    seeds_figure(panels, ["a", "b"], tmp_path / "a.svg")
    left, right = drawn[0].axes
    paired = [line.get_ydata() for line in left.lines[:2]]
    assert paired[0] == pytest.approx([50, 60]) and paired[1] == pytest.approx([70, 60])
    assert [round(x) for x in left.lines[0].get_xdata()] == [0, 1]
    assert left.lines[2].get_ydata() == pytest.approx([60, 60])
    assert right.lines[0].get_ydata() == pytest.approx([70, 40])
    assert right.lines[1].get_ydata() == pytest.approx([40, math.nan], nan_ok=True)
    assert {"x", "average", "accuracy in % ↑, n = 12,345", "55.0", "60.0", "40.0"} <= set(texts(drawn[0]))
    low, high = left.get_ylim()
    assert low < 50 and high > 70


def test_a_long_metric_leaves_room_for_n(drawn, tmp_path):
    values = {("a", 0): -1.5, ("a", 1): 0.25}
    metric = "over a-long-name+another-long-name in per cent ↑"
    seeds_figure([SeedsPanel("delta_m", metric, "n = 4", values, "number")] * 3, ["a"], tmp_path / "a.svg")
    assert_readable(drawn[0])
    shown = [text for text in texts(drawn[0]) if text.endswith(", n = 4")]
    assert len(shown) == 3 and shown[0].startswith("over a-long-name") and "−0.625" in texts(drawn[0])


# ---- training


def log(steps=40, fade=False):
    return [
        {
            "step": s,
            "loss": 9.0,
            "ce": None if s == 3 else 2 / s,
            "accuracy": 0.5,
            "fade": min(1, s / 20) if fade else None,
        }
        for s in range(1, steps + 1)
    ]


def test_curves_of_all_arms(drawn, tmp_path):
    logs = {arm: log(fade=number in (2, 3)) for number, arm in enumerate(ARMS[:5])}
    curves_figure(logs, TITLES, tmp_path / "a.svg")
    assert_readable(drawn[0])
    ce, accuracy, fade = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (ce, accuracy, fade)] == list(TITLES.values())
    # the missing value is left out, and a constant stays the constant: 50 %
    assert len(ce.lines) == 10 and 3 not in ce.lines[0].get_xdata() and ce.lines[0].get_ydata()[0] == 2
    assert accuracy.lines[1].get_ydata() == pytest.approx([50.0] * 40)
    assert len(fade.lines) == 2 and fade.lines[0].get_ydata()[-1] == 1 and fade.lines[0].is_dashed()
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert set(shown) == set(ARMS[:5])
    colors = dict(zip(shown, (patch.get_facecolor() for patch in drawn[0].legends[0].get_patches())))
    from matplotlib.colors import to_rgba

    assert to_rgba(fade.lines[0].get_color()) == colors["emtal"]
    assert ce.get_xlim() == fade.get_xlim()


@pytest.mark.parametrize("count", [1, 6])
def test_curves_of_experts(drawn, tmp_path, count):
    titles = {"loss": "Training loss", "accuracy": "Training accuracy (%)", "robust": "Accuracy under attack (%)"}

    def steps(total, robust):
        rows = [{"step": s, "loss": 2 / s, "accuracy": None if s == 3 else 0.5} for s in range(1, total + 1)]
        return [{**row, "robust": 0.25} for row in rows] if robust else rows

    logs = {"clean": steps(30, False)} | {f"expert {i} of a long name": steps(3000, True) for i in range(count)}
    curves_figure(logs, titles, tmp_path / "a.svg")
    assert_readable(drawn[0])
    loss, accuracy, robust = drawn[0].axes
    assert loss.lines[0].get_xdata().tolist() == list(range(1, 31)) and loss.get_title(loc="left") == "Training loss"
    assert 3 not in accuracy.lines[0].get_xdata() and accuracy.lines[1].get_ydata() == pytest.approx([50.0] * 29)
    assert robust.lines[1].get_ydata() == pytest.approx([25.0] * 3000)
    # a thin and a thick line for each; what an arm has not logged is left out
    assert [len(axes.lines) for axes in (loss, accuracy, robust)] == [2 * count + 2, 2 * count + 2, 2 * count]
    assert loss.get_xlim() == robust.get_xlim() and loss.get_xlim()[1] > 3000


@pytest.mark.parametrize(
    "rows", [[{"step": 1, "loss": 2.0}], [{"step": 1, "accuracy": 0.3}, {"step": 2, "accuracy": 0.4}]]
)
def test_short_curves(drawn, tmp_path, rows):
    curves_figure({"a": rows}, {"loss": "Loss", **TITLES}, tmp_path / "a.svg")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_marker() == ("o" if len(rows) == 1 else "None")


def test_a_curve_needs_values(tmp_path):
    with pytest.raises(UserError, match="none of a, b has logged"):
        curves_figure({"a": [{"step": 1, "fade": 0.5, "lr": 0.1}], "b": []}, TITLES, tmp_path / "a.svg")
