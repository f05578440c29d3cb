"""What the figures show: the right lengths and intervals, and no text on other text for one to twelve sets."""

import sys

import numpy as np
import pytest
import torch
from helpers.readable import assert_readable, visible_texts
from helpers.results import PGD, cell, comparison, corruption

from vismt.base.errors import UserError
from vismt.report import figures, plotting
from vismt.robustness.corruptions import CORRUPTIONS
from vismt.uncertainty.intervals import CLEAN, Condition

LONG = "a_data_set_with_a_name_that_does_not_end"
ARMS = ["frozen", "clean", "merged", "merged:default", "average", "logits", "min_ce", "expert:4.5", "merged+finetune"]


def comparisons(
    sets, protocols=("5-way 1-shot",), conditions=(CLEAN, PGD), arms=("frozen", "adapted"), chance: float | None = 0.2
):
    return [
        comparison(
            name, {arm: cell(0.4 + 0.01 * j, 0.02, 60) for arm in arms}, condition, protocol=protocol, chance=chance
        )
        for protocol in protocols
        for j, name in enumerate(sets)
        for condition in conditions
    ]


@pytest.mark.parametrize("count", [1, 12])
def test_labels_never_overlap(drawn, tmp_path, count):
    names = [f"set_{i}" for i in range(count - 1)] + [LONG]
    figures.domain_bars(comparisons(names, ("5-way 1-shot", "5-way 5-shot")), tmp_path / "a.svg")
    assert_readable(drawn[0])


def test_many_arms_and_conditions(drawn, tmp_path):
    labels = ("a", "b", "c", "a condition with a very long text of 60 characters")
    rows = comparisons(
        ["digits", LONG, "average"],
        ("variable way and shot",),
        (CLEAN, *(Condition(label, "attack", label, 0.1) for label in labels)),
        ("frozen", "adapted", "merged", "pool"),
        chance=None,
    )
    figures.domain_bars(rows, tmp_path / "a.svg")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 5
    # the number of ways varies, so no level of chance is claimed
    assert all(text != "chance" for text, _ in visible_texts(drawn[0]))


def test_a_condition_that_one_protocol_lacks_has_no_panel(drawn, tmp_path):
    rows = comparisons(["digits"], conditions=(CLEAN, PGD)) + comparisons(["digits"], ("10-way 1-shot",), (CLEAN,))
    figures.domain_bars(rows, tmp_path / "a.svg")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 3
    assert [text for text, _ in visible_texts(drawn[0])].count("digits") == 3


def test_bars_have_the_lengths_of_the_numbers(drawn, painted, tmp_path):
    cells = {"frozen": cell(0.25, 0.05, 60), "adapted": cell(0.5, 0.1, 60)}
    rows = [comparison("digits", cells, protocol="4-way 1-shot", chance=0.25)]
    path = figures.domain_bars(rows, tmp_path / "figures" / "a.svg")
    (axes,) = drawn[0].axes
    # per cent: 25 and 50; the interval of 0.5 +- 0.1 reaches from 40 to 60; chance of 4 ways is 25
    assert [bar.get_width() for bar in axes.patches if hasattr(bar, "get_width")][:2] == [25.0, 50.0]
    reach = [sorted(segment[:, 0]) for lines in axes.collections for segment in lines.get_segments()]
    assert reach == [pytest.approx([20, 30]), pytest.approx([40, 60])]
    chance = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in chance] == [25.0]
    assert {"25.0", "50.0", "digits", "Clean"} <= {text for text, _ in visible_texts(drawn[0])}
    assert path.stat().st_size > 5000


def number(data, cells, metric, protocol, unit, **changes):
    return comparison(
        data, cells, metric=metric, protocol=protocol, unit=unit, scale="number", better="lower", chance=None, **changes
    )


@pytest.mark.parametrize(("value", "half"), [(3.5, 0.5), (0.75, 0.25)])  # a largest value of one is no share either
def test_values_that_are_not_shares(drawn, tmp_path, value, half):
    cells = {"frozen": cell(value, half, 10), "adapted": cell(0.5, 0.25, 10)}
    figures.domain_bars([number("text", cells, "loss", "validation", "documents")], tmp_path / "a.svg")
    assert [bar.get_width() for bar in drawn[0].axes[0].patches][:2] == [value, 0.5]  # not multiplied by 100
    assert drawn[0].axes[0].get_xlim()[1] == pytest.approx(1.1 * (value + half))


def test_a_bar_below_zero_is_not_cut_off(drawn, tmp_path):
    cells = {"lora": cell(-3.0, 0.5, 6), "full": cell(2.0, 1.0, 6)}
    figures.domain_bars(
        [number("camvid", cells, "delta_m over single in per cent", "test", "images")], tmp_path / "a.svg"
    )
    # 1.1 * (-3 - 0.5); without a negative value the axis starts at 0
    assert drawn[0].axes[0].get_xlim()[0] == pytest.approx(-3.85)
    figures.domain_bars(comparisons(["digits"]), tmp_path / "b.svg")
    assert drawn[1].axes[0].get_xlim()[0] == 0


def test_an_arm_has_the_colour_of_its_place_among_all(drawn, tmp_path):
    from matplotlib.colors import to_rgba

    rows = [number("rooms", {"emtal": cell(1.0, 0.1, 3)}, "RMSE in m", "test", "images")]
    for order in (None, ["alone", "emtal"]):
        figures.domain_bars(rows, tmp_path / "a.svg", order)
        (bar,) = drawn[-1].axes[0].patches
        assert bar.get_facecolor() == to_rgba(plotting.color_of("emtal", order or ["emtal"]))
        assert drawn[-1].legends[0].get_patches()[0].get_facecolor() == bar.get_facecolor()


def test_between_two_radii_the_larger_one_is_proved(drawn, tmp_path):
    rows = [
        comparison("digits", {"adapted": cell(value, 0.02, 60)}, Condition(f"smoothed {r}", "certified", "smoothed", r))
        for r, value in ((0.0, 0.8), (0.25, 0.6), (0.5, 0.1))
    ]
    figures.certified_figure(rows, tmp_path / "a.svg")
    axes = drawn[0].axes[0]
    assert axes.lines[0].get_drawstyle() == "steps-pre"
    (shaded,) = [part for part in axes.collections if part.get_facecolor().size and part.get_alpha() == 0.15]
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in shaded.get_paths()[0].vertices}
    assert {(0.0, 60.0), (0.25, 60.0), (0.25, 10.0), (0.5, 10.0)} <= corners


def test_running_mean_by_hand():
    # 40 values: memory 2, keep = 1 - 2/3 = 1/3. First 0; second (0/3 + 1) / (1/3 + 1) = 3/4;
    # third ((0/3 + 1)/3 + 1) / ((1/3 + 1)/3 + 1) = (4/3) / (13/9) = 12/13
    smooth = plotting.running_mean(np.array([0.0] + [1.0] * 39))
    assert smooth[:3] == pytest.approx([0, 3 / 4, 12 / 13])
    assert plotting.running_mean(np.array([5.0])).tolist() == [5.0]


def test_nothing_global_is_touched(tmp_path):
    import matplotlib

    before, state = dict(matplotlib.rcParams), torch.random.get_rng_state()
    figures.domain_bars(comparisons(["digits"]), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before and torch.equal(state, torch.random.get_rng_state())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_same_input_same_file(tmp_path):
    first = figures.domain_bars(comparisons(["digits"]), tmp_path / "a.svg").read_bytes()
    assert first == figures.domain_bars(comparisons(["digits"]), tmp_path / "b.svg").read_bytes()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "vismt\[jobs\]"'):
        figures.domain_bars(comparisons(["digits"]), tmp_path / "a.svg")


def test_twelve_arms_have_twelve_colours_and_a_legend_that_fits(drawn, tmp_path):
    arms = [
        "frozen",
        "clean",
        "merged",
        "merged:default",
        "average",
        "logits",
        "min_ce",
        "merged+finetune",
        *(f"expert:{level}" for level in (0.01, 0.1, 6, 8)),
    ]
    path = figures.domain_bars(comparisons(["digits", LONG], arms=arms, conditions=(CLEAN,)), tmp_path / "a.svg")
    assert_readable(drawn[0])
    legend = drawn[0].legends[0]
    assert {text.get_text() for text in legend.get_texts()} == {*arms, "chance"} and path.exists()
    assert len({plotting.color_of(arm, arms) for arm in arms}) == 12
    # read row by row, the names stand in their order
    places = [
        (-round(text.get_window_extent().y0), text.get_window_extent().x0, text.get_text())
        for text in legend.get_texts()
    ]
    assert [name for _, _, name in sorted(places)] == [*arms, "chance"]


# ---- scores by level


def test_corruptions_by_severity(drawn, tmp_path):
    rows = [
        comparison("digits", {arm: cell(0.9 - 0.1 * s, 0.05, 60) for arm in ARMS}, corruption(name, s))
        for name in CORRUPTIONS
        for s in (1, 3, 5)
    ]
    rows[0].cells["clean"] = cell(0.2, 0.05, 60)
    figures.level_curves(rows, tmp_path / "a.svg", "severity")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 16 and drawn[0].axes[-1].get_title(loc="left") == "mean of 15"
    first, mean = drawn[0].axes[0], drawn[0].axes[-1]
    assert first.lines[0].get_ydata().tolist() == pytest.approx([80, 60, 40])
    # of one the first of three values is 20 and not 80: the mean of fifteen is (14 * 80 + 20) / 15 = 76
    assert mean.lines[1].get_ydata().tolist() == pytest.approx([76, 60, 40])
    # arms are beside each other, by at most a quarter of the step of 2
    assert all(abs(x - s) < 0.5 for x, s in zip(first.lines[0].get_xdata(), (1, 3, 5)))
    assert drawn[0].axes[-1].get_xlabel() == "severity"


def attack(radius: float, family: str = "PGD linf") -> Condition:
    return Condition(f"{family} {radius:g}/255", "attack", family, radius / 255)


def test_attacks_by_radius_begin_with_the_clean_score(drawn, tmp_path):
    values = {CLEAN: (0.8, 0.7), attack(8): (0.1, 0.3), attack(2): (0.4, 0.6), attack(2, "FGSM linf"): (0.5, 0.65)}
    rows = [
        comparison("digits", {"frozen": cell(a, 0.05, 60), "adapted": cell(b, 0.02, 60)}, condition)
        for condition, (a, b) in values.items()
    ]
    figures.level_curves(rows, tmp_path / "a.svg", "radius")
    assert_readable(drawn[0])
    pgd, fgsm, mean = drawn[0].axes
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["PGD linf", "FGSM linf", "mean of 2"]
    # by rising radius, whatever the order of the conditions
    assert pgd.lines[0].get_ydata().tolist() == pytest.approx([80, 40, 10])
    assert pgd.lines[1].get_ydata().tolist() == pytest.approx([70, 60, 30])
    assert pgd.lines[0].get_xdata() == pytest.approx([0, 2 / 255, 8 / 255], abs=0.5 / 255)
    assert fgsm.lines[0].get_ydata().tolist() == pytest.approx([80, 50])
    # the mean over the levels that both families have: clean and 2
    assert mean.lines[0].get_ydata().tolist() == pytest.approx([80, 45])
    whiskers = [segment[:, 1].tolist() for segment in pgd.collections[0].get_segments()]
    assert [sorted(ends) for ends in whiskers] == [pytest.approx(ends) for ends in ([75, 85], [35, 45], [5, 15])]
    assert not mean.collections  # its families share their examples, so no width is claimed


def test_one_family_has_no_mean(drawn, tmp_path):
    rows = [comparison("digits", {"frozen": cell(0.5, 0.1, 9)}, corruption("fog", s)) for s in (1, 4)]
    figures.level_curves(rows, tmp_path / "a.svg", "severity")
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "fog" and axes.get_xlim() == pytest.approx((0.1, 4.9))


def test_scores_that_are_not_shares_by_level_are_not_shown_in_per_cent(drawn, tmp_path):
    rows = [
        comparison("text", {"frozen": cell(2.5, 0.5, 9)}, attack(r), scale="number", better="lower", metric="NLL")
        for r in (1, 2)
    ]
    figures.level_curves(rows, tmp_path / "a.svg", "radius")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_ydata().tolist() == [2.5, 2.5] and axes.get_ylim()[1] == pytest.approx(1.05 * 3)
