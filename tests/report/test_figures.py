"""What the figures show: the right lengths and intervals, and no text on other text for one to twelve sets."""

import sys

import numpy as np
import pytest
import torch
from helpers.readable import assert_readable, visible_texts
from torchvision.io import decode_png, read_file

from vismt.errors import UserError
from vismt.report import figures
from vismt.report import plotting as canvas
from vismt.report.comparison import Cell, Comparison

LONG = "a_data_set_with_a_name_that_does_not_end"


def comparisons(
    sets, protocols=("5-way 1-shot",), conditions=("clean", "PGD-10 linf 4.5/255"), models=("frozen", "adapted")
):
    return [
        Comparison(
            name,
            protocol,
            condition,
            "accuracy",
            "episodes",
            0,
            {model: Cell(0.4 + 0.01 * j, 0.02, 60) for model in models},
            None,
            False,
        )
        for protocol in protocols
        for j, name in enumerate(sets)
        for condition in conditions
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_labels_never_overlap(drawn, tmp_path, count):
    names = [f"set_{i}" for i in range(count - 1)] + [LONG]
    figures.domain_bars(comparisons(names, ("5-way 1-shot", "5-way 5-shot")), tmp_path / "a.png")
    assert_readable(drawn[0])


def test_many_models_and_conditions(drawn, tmp_path):
    made = comparisons(
        ["digits", LONG, "average"],
        ("variable way and shot",),
        ("clean", "a", "b", "c", "a condition with a very long text of 60 characters"),
        ("frozen", "adapted", "merged", "pool"),
    )
    figures.domain_bars(made, tmp_path / "a.png")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 5
    # no N in the protocol, so no level of chance is claimed
    assert all(text != "chance" for text, _ in visible_texts(drawn[0]))


def test_bars_have_the_lengths_of_the_numbers(drawn, tmp_path):
    cells = {"frozen": Cell(0.25, 0.05, 60), "adapted": Cell(0.5, 0.1, 60)}
    made = [Comparison("digits", "4-way 1-shot", "clean", "accuracy", "episodes", 0, cells, None, False)]
    path = figures.domain_bars(made, tmp_path / "figures" / "a.png")
    (axes,) = drawn[0].axes
    # per cent: 25 and 50; the interval of 0.5 +- 0.1 reaches from 40 to 60; chance of 4 ways is 25
    assert [bar.get_width() for bar in axes.patches if hasattr(bar, "get_width")][:2] == [25.0, 50.0]
    reach = [sorted(segment[:, 0]) for lines in axes.collections for segment in lines.get_segments()]
    assert reach == [pytest.approx([20, 30]), pytest.approx([40, 60])]
    chance = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in chance] == [25.0]
    assert {"25.0", "50.0", "digits", "Clean"} <= {text for text, _ in visible_texts(drawn[0])}
    picture = decode_png(read_file(str(path)))
    assert picture.shape[0] in (3, 4) and picture.shape[1] > 100


def test_values_that_are_no_shares(drawn, tmp_path):
    cells = {"frozen": Cell(3.5, 0.5, 10), "adapted": Cell(2.0, 0.25, 10)}
    made = [Comparison("text", "validation", "clean", "loss", "documents", 0, cells, None, False)]
    figures.domain_bars(made, tmp_path / "a.png")
    # not multiplied by 100, axis to 1.1 * (3.5 + 0.5)
    assert [bar.get_width() for bar in drawn[0].axes[0].patches][:2] == [3.5, 2.0]
    assert drawn[0].axes[0].get_xlim()[1] == pytest.approx(4.4)


def test_a_bar_below_zero_is_not_cut_off(drawn, tmp_path):
    cells = {"lora": Cell(-3.0, 0.5, 6), "full": Cell(2.0, 1.0, 6)}
    made = [Comparison("camvid", "test", "clean", "delta_m over single in per cent", "images", 0, cells, None, False)]
    figures.domain_bars(made, tmp_path / "a.png")
    # 1.1 * (-3 - 0.5); without a negative value the axis starts at 0
    assert drawn[0].axes[0].get_xlim()[0] == pytest.approx(-3.85)
    figures.domain_bars(comparisons(["digits"]), tmp_path / "b.png")
    assert drawn[1].axes[0].get_xlim()[0] == 0


def test_training_curve(drawn, tmp_path):
    rows = [{"step": s, "loss": 1 / s, "accuracy": None if s == 2 else 0.5} for s in range(1, 50)]
    figures.training_curve(rows, tmp_path / "a.png")
    assert_readable(drawn[0])
    top, bottom = drawn[0].axes
    assert top.lines[0].get_xdata().tolist() == list(range(1, 50))
    # the missing value is left out and a constant stays the constant: 50 %
    assert 2 not in bottom.lines[0].get_xdata() and bottom.lines[1].get_ydata() == pytest.approx([50.0] * 48)


def test_running_mean_by_hand():
    # 40 values: memory 2, keep = 1 - 2/3 = 1/3. First 0; second (0/3 + 1) / (1/3 + 1) = 3/4;
    # third ((0/3 + 1)/3 + 1) / ((1/3 + 1)/3 + 1) = (4/3) / (13/9) = 12/13
    smooth = canvas.running_mean(np.array([0.0] + [1.0] * 39))
    assert smooth[:3] == pytest.approx([0, 3 / 4, 12 / 13])
    assert canvas.running_mean(np.array([5.0])).tolist() == [5.0]


@pytest.mark.parametrize(
    "rows", [[{"step": 1, "loss": 2.0}], [{"step": 1, "accuracy": 0.3}, {"step": 2, "accuracy": 0.4}]]
)
def test_short_curves(drawn, tmp_path, rows):
    figures.training_curve(rows, tmp_path / "a.png")
    assert len(drawn[0].axes) == 1


def test_a_curve_needs_values(tmp_path):
    with pytest.raises(UserError, match="none of 1 logged lines has a loss"):
        figures.training_curve([{"step": 1, "lr": 0.1}], tmp_path / "a.png")


def panel(classes, size=16, attacked=True):
    generator = np.random.default_rng(0)
    images = generator.integers(20, 230, (2 * len(classes), 3, size, size), dtype=np.uint8)
    labels = np.repeat(np.arange(len(classes)), 2)
    arrays = {
        "support": images[::2],
        "support_labels": labels[::2],
        "query": images,
        "query_labels": labels,
        "predictions": labels,
        "classes": np.array(classes),
    }
    if attacked:
        arrays["adversarial"] = images + np.uint8(4)
        arrays["adversarial_predictions"] = (labels + 1) % len(classes)
    return arrays


def test_episode_grid(drawn, tmp_path):
    figures.episode_grid(panel(["cat", "a very long class name, really", "costs $5 or $6"]), tmp_path / "a.png")
    assert_readable(drawn[0])
    # 3 support images; 2 queries of 3 classes, each clean, attacked and changed: 3 + 2 * 3 * 3
    assert len(drawn[0].axes) == 21
    texts = [text for text, _ in visible_texts(drawn[0])]
    # the change is 4 of 255 everywhere: floor(127 / 4) = 31, drawn at 128 + 31 * 4 = 252
    assert texts.count("change × 31") == 2
    assert np.asarray(drawn[0].axes[-1].images[0].get_array()).tolist() == [[[252] * 3] * 16] * 16
    # class 0 is right when clean and taken for class 1 when attacked
    assert texts.count("✓ cat") == 2 and texts.count("✗ cat") == 2 and "✗ a very long…" in texts
    right = drawn[0].axes[3].spines["top"].get_edgecolor()
    wrong = drawn[0].axes[6].spines["top"].get_edgecolor()
    from matplotlib.colors import to_rgba

    assert right == to_rgba(canvas.RIGHT) and wrong == to_rgba(canvas.WRONG)


def test_episode_without_attack_and_with_many_classes(drawn, tmp_path):
    figures.episode_grid(panel([f"class {i}" for i in range(20)], attacked=False), tmp_path / "a.png")
    assert_readable(drawn[0])
    # 8 of 20 classes: one support and two queries each
    assert len(drawn[0].axes) == 8 * 3


def test_nothing_global_is_touched(tmp_path):
    import matplotlib

    before, state = dict(matplotlib.rcParams), torch.random.get_rng_state()
    figures.domain_bars(comparisons(["digits"]), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before and torch.equal(state, torch.random.get_rng_state())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_same_input_same_file(tmp_path):
    one = figures.domain_bars(comparisons(["digits"]), tmp_path / "a.png").read_bytes()
    assert one == figures.domain_bars(comparisons(["digits"]), tmp_path / "b.png").read_bytes()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match=r'pip install "vismt\[report\]"'):
        figures.domain_bars(comparisons(["digits"]), tmp_path / "a.png")


def test_twelve_models_have_twelve_colours_and_a_legend_that_fits(drawn, tmp_path):
    models = [
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
    path = figures.domain_bars(comparisons(["digits", LONG], models=models, conditions=("clean",)), tmp_path / "a.png")
    assert_readable(drawn[0])
    legend = drawn[0].legends[0]
    assert {text.get_text() for text in legend.get_texts()} == {*models, "chance"} and path.exists()
    assert len({canvas.color_of(model, models) for model in models}) == 12
    # read row by row, the names stand in their order
    places = [
        (-round(text.get_window_extent().y0), text.get_window_extent().x0, text.get_text())
        for text in legend.get_texts()
    ]
    assert [name for _, _, name in sorted(places)] == [*models, "chance"]
