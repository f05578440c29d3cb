"""The figures of a pool and of corruptions, and what a report finds of them in a run folder."""

import json

import pytest
from helpers.readable import assert_readable, visible_texts

from vismt.errors import UserError
from vismt.jobs.fewshot import figures as pool_figures
from vismt.jobs.fewshot.report import corruption_pictures, pool_pictures
from vismt.report.comparison import Cell, Comparison
from vismt.robustness.corruptions import CORRUPTIONS

MODELS = ["frozen", "clean", "merged", "merged:default", "average", "logits", "min_ce", "expert:4.5", "merged+finetune"]


def log(steps=30, robust=True):
    return [
        {"step": s, "loss": 2 / s, "accuracy": None if s == 3 else 0.5, **({"robust": 0.25} if robust else {})}
        for s in range(1, steps + 1)
    ]


def comparison(condition, models=("frozen", "adapted"), data="digits", value=0.4):
    cells = {model: Cell(value, 0.05, 60) for model in models}
    return Comparison(data, "5-way 1-shot", condition, "accuracy", "episodes", 1, cells, None, False)


@pytest.mark.parametrize("count", [1, 6])
def test_expert_curves(drawn, tmp_path, count):
    logs = {"clean": log(robust=False)} | {f"expert {i} of a long name": log(3000) for i in range(count)}
    pool_figures.expert_curves(logs, tmp_path / "a.png")
    assert_readable(drawn[0])
    axes = drawn[0].axes
    assert len(axes) == 3 * (count + 1)
    loss, accuracy, robust = axes[0], axes[count + 1], axes[2 * count + 2]
    assert loss.lines[0].get_xdata().tolist() == list(range(1, 31)) and loss.get_title(loc="left") == "Loss"
    # per cent, the missing value left out; all of a column share their scale, also with one that stops earlier
    assert 3 not in accuracy.lines[0].get_xdata() and accuracy.lines[1].get_ydata() == pytest.approx([50.0] * 29)
    assert loss.get_xlim() == axes[1].get_xlim() and loss.get_ylim() == axes[1].get_ylim()
    assert not robust.lines and "not logged" in [text for text, _ in visible_texts(drawn[0])]


def test_expert_curves_need_values(tmp_path):
    with pytest.raises(UserError, match="none of a, b has logged"):
        pool_figures.expert_curves({"a": [{"step": 1}], "b": []}, tmp_path / "a.png")


@pytest.mark.parametrize(("sets", "experts"), [(1, 2), (10, 4), (3, 12)])
def test_mixture_bars(drawn, tmp_path, sets, experts):
    keys = [(f"set {i} of a name that does not end", "variable way and shot, n = 600") for i in range(sets)]
    panel = {key: [1 / experts] * experts for key in keys}
    labels = [f"{0.5 * i:g}" for i in range(experts)]
    pool_figures.mixture_bars({"merged": panel, "min_ce": panel}, labels, tmp_path / "a.png")
    assert_readable(drawn[0])
    bars = drawn[0].axes[0].patches
    assert len(bars) == sets * experts and sum(bar.get_width() for bar in bars) == pytest.approx(100 * sets)
    # side by side from 0 to 100, the colours those of the legend
    assert bars[0].get_x() == 0 and bars[1].get_x() == pytest.approx(100 / experts)
    shown = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(drawn[0].legends[0].get_texts(), drawn[0].legends[0].get_patches())
    }
    assert [shown[label] for label in labels] == [bar.get_facecolor() for bar in bars[:experts]]
    assert len(set(shown.values())) == experts  # colours do not come twice


def test_corruption_curves(drawn, tmp_path):
    made = [comparison(f"{name} {s}", MODELS, value=0.9 - 0.1 * s) for name in CORRUPTIONS for s in (1, 3, 5)]
    made[0].cells["clean"] = Cell(0.2, 0.05, 60)
    pool_figures.corruption_curves([comparison("clean"), *made], tmp_path / "a.png")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 16 and drawn[0].axes[-1].get_title(loc="left") == "mean of 15"
    first, mean = drawn[0].axes[0], drawn[0].axes[-1]
    assert first.lines[0].get_ydata().tolist() == pytest.approx([80, 60, 40])
    # of one the first of three values is 20 and not 80: the mean of fifteen is (14 * 80 + 20) / 15 = 76
    assert mean.lines[1].get_ydata().tolist() == pytest.approx([76, 60, 40])
    assert [round(x) for x in first.lines[0].get_xdata()] == [1, 3, 5]


def test_corruptions_in_a_report(tmp_path):
    few = [comparison("clean"), *(comparison(f"fog {s}") for s in (1, 2, 3))]
    assert corruption_pictures(tmp_path, few) == []
    many = [*few, comparison("fog 4"), *(comparison(f"fog {s}", data="crops") for s in (1, 2, 3, 4))]
    assert len(corruption_pictures(tmp_path, many)) == 2
    average = [*many, *(comparison(f"fog {s}", data="average") for s in (1, 2, 3, 4))]
    (picture,) = corruption_pictures(tmp_path, average)
    assert "average over the sets" in picture.caption and "n = 60 episodes" in picture.caption and picture.path.exists()


def row(model, data="digits", condition="clean"):
    return {"model": model, "data": data, "protocol": "5-way 1-shot", "condition": condition}


def records(folder, model, mixtures, data="digits"):
    path = folder / "records" / f"{data}-5-way-1-shot-{model}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [{"protocol": "00"}, *({"episode": i, "clean": 0.5, "mixture": one} for i, one in enumerate(mixtures))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_mixture_is_a_mean_over_the_episodes_of_a_set(drawn, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"experts": [{"label": "0.1"}, {"label": "8"}]}))
    records(tmp_path, "merged", [[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.75, 0.25]])
    records(tmp_path, "average", [[0.5, 0.5]] * 2)
    records(tmp_path, "merged-finetune", [[1.0, 0.0]] * 2)
    rows = [row("merged"), row("merged", condition="fog 1"), row("average"), row("merged+finetune"), row("frozen")]
    (picture,) = pool_pictures(tmp_path, rows)
    assert picture.title == "Pool mixture per domain" and picture.caption.startswith("5-way 1-shot. Mean weight")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [75.0, 25.0]
    texts = [text for text, _ in visible_texts(drawn[0])]
    assert {"0.1", "8", "merged", "digits, n = 4", "75", "25"} <= set(texts)


def test_labels_come_from_the_assembled_pool_or_are_numbers(drawn, tmp_path):
    records(tmp_path, "merged", [[0.5, 0.5], [0.5, 0.5]])
    pool_pictures(tmp_path, [row("merged")])
    assert {"expert 1", "expert 2"} <= {text for text, _ in visible_texts(drawn[0])}
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "pool.json").write_text(json.dumps({"experts": [{"label": "a"}, {"label": "b"}]}))
    (tmp_path / "config.resolved.yaml").write_text(f"pool: {{folder: '{joined}'}}\n")
    pool_pictures(tmp_path, [row("merged")])
    assert {"a", "b"} <= {text for text, _ in visible_texts(drawn[1])}
    (joined / "pool.json").write_text("{}")
    with pytest.raises(UserError, match="no index of a pool"):
        pool_pictures(tmp_path, [row("merged")])


def test_nothing_without_a_pool_and_refusals(tmp_path):
    assert pool_pictures(tmp_path, [row("frozen")]) == []
    records(tmp_path, "merged", [[1.0], [1.0]])
    assert pool_pictures(tmp_path, [row("merged")]) == []  # of one expert there is nothing to tell
    records(tmp_path, "merged", [[1.0], [0.5, 0.5]])
    with pytest.raises(UserError, match="mixtures of different pools"):
        pool_pictures(tmp_path, [row("merged")])
    records(tmp_path, "merged", [[0.5, 0.5]] * 2)
    records(tmp_path, "merged", [[0.2, 0.3, 0.5]] * 2, data="crops")
    with pytest.raises(UserError, match=r"mixtures of \[2, 3\] experts"):
        pool_pictures(tmp_path, [row("merged"), row("merged", data="crops")])


def test_experts_are_drawn_in_the_order_of_the_pool(drawn, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"experts": [{"label": "8"}, {"label": "0.1"}]}))
    for label in ("0.1", "8", "clean"):
        path = tmp_path / "experts" / label / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in log(5)))
    (picture,) = pool_pictures(tmp_path, [])
    assert "5 steps" in picture.caption
    places = {text: box.y0 for text, box in visible_texts(drawn[0]) if text in ("0.1", "8", "clean")}
    assert places["clean"] > places["8"] > places["0.1"]
