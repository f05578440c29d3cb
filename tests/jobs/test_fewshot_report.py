"""What a report shows of a few-shot run: mixtures of a pool, chosen settings, and episodes with their attack."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.readable import assert_readable, visible_texts
from helpers.results import PGD, result, write_lines

from vismt.base.errors import UserError
from vismt.jobs.fewshot.config import FewShotConfig, PoolConfig
from vismt.jobs.fewshot.figures import episode_grid, mixture_bars
from vismt.jobs.fewshot.report import sections
from vismt.report import plotting
from vismt.storage.files import sealed

# ---- mixtures of a pool


@pytest.mark.parametrize(("sets", "experts"), [(10, 4), (3, 12)])
def test_mixture_bars(drawn, tmp_path, sets, experts):
    keys = [(f"set {i} of a name that does not end", "variable way and shot, n = 600") for i in range(sets)]
    panel = {key: [1 / experts] * experts for key in keys}
    short = {("set", ""): panel[keys[0]]}
    labels = [f"{0.5 * i:g}" for i in range(experts)]
    mixture_bars({"merged": panel, "min_ce": short}, labels, tmp_path / "a.png")
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


POOLED = FewShotConfig(pool=PoolConfig(levels=[0.1, 8.0], clean=True))


def shown(folder, rows, config=POOLED, arms=("clean", "0.1", "8"), seeds=(3, 5)):
    study = SimpleNamespace(arms=dict.fromkeys(arms), seeds=list(seeds))
    return {section.title: section for section in sections(folder, config, study, rows)}


def mixtures(folder, *rows, **options):
    return shown(folder, rows, **options)["Pool"].pictures


def episodes(folder, arm, weights, data="digits", seed=3):
    lines = [{"protocol": "00"}]
    lines += [{"episode": i, "clean": 0.5, "mixture": mixture} for i, mixture in enumerate(weights)]
    write_lines(folder / "episodes" / f"seed-{seed}" / f"{data}-5-way-1-shot-{arm}.jsonl", lines)


def test_the_mixture_is_a_mean_over_the_episodes_of_a_set(drawn, tmp_path):
    episodes(tmp_path, "merged", [[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.75, 0.25]])
    episodes(tmp_path, "merged", [[0.0, 1.0]] * 2, seed=5)  # the first seed is shown
    episodes(tmp_path, "average", [[0.5, 0.5]] * 2)
    episodes(tmp_path, "merged-finetune", [[1.0, 0.0]] * 2)
    rows = [
        result(arm="merged"),
        result(arm="merged", condition=PGD),
        result(arm="merged", seed=3),
        result(arm="average"),
        result(arm="merged+finetune"),
        result(arm="frozen"),
    ]
    (picture,) = mixtures(tmp_path, *rows)
    assert picture.title == "Pool mixture per domain" and picture.caption.startswith("5-way 1-shot. Mean weight")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [75.0, 25.0]
    texts = [text for text, _ in visible_texts(drawn[0])]
    assert {"0.1", "8", "merged", "digits, n = 4", "75", "25"} <= set(texts)


def test_several_protocols_are_named_behind_the_set(drawn, tmp_path):
    episodes(tmp_path, "merged", [[0.5, 0.5]] * 2)
    (picture,) = mixtures(tmp_path, result(arm="merged"), result(arm="merged", protocol="5-way 5-shot"))
    assert picture.caption.startswith("Mean weight")
    assert "digits, 5-way 1-shot, n = 2" in {text for text, _ in visible_texts(drawn[0])}


def test_labels_are_those_of_the_assembled_pool_or_numbers(drawn, tmp_path):
    episodes(tmp_path, "merged", [[0.5, 0.5], [0.5, 0.5]])
    mixtures(tmp_path, result(arm="merged"), arms=("clean",))
    assert {"expert 1", "expert 2"} <= {text for text, _ in visible_texts(drawn[0])}
    joined = tmp_path / "joined"
    joined.mkdir()
    entries = [{"label": label, "folder": f"expert-{number}", "scale": 1.0} for number, label in enumerate("ab")]
    (joined / "pool.json").write_text(sealed({"format": 1, "experts": entries}))
    config = replace(POOLED, pool=replace(POOLED.pool, folder=str(joined)))
    mixtures(tmp_path, result(arm="merged"), config=config, arms=())
    assert {"a", "b"} <= {text for text, _ in visible_texts(drawn[1])}
    (joined / "pool.json").write_text(sealed({}))
    with pytest.raises(UserError, match="pool"):
        mixtures(tmp_path, result(arm="merged"), config=config, arms=())


def test_nothing_without_a_pool_and_refusals(tmp_path):
    merged = result(arm="merged")
    assert mixtures(tmp_path, result(arm="frozen")) == []
    episodes(tmp_path, "merged", [[0.5, 0.5]] * 2)
    assert mixtures(tmp_path, merged, config=FewShotConfig()) == []
    episodes(tmp_path, "merged", [[1.0], [1.0]])
    assert mixtures(tmp_path, merged) == []  # the mixture of a lone expert shows nothing
    episodes(tmp_path, "merged", [[1.0], [0.5, 0.5]])
    with pytest.raises(UserError, match="mixtures of different pools"):
        mixtures(tmp_path, merged)
    episodes(tmp_path, "merged", [[0.5, "a"]] * 2)
    with pytest.raises(UserError, match="mixtures of different pools"):
        mixtures(tmp_path, merged)
    episodes(tmp_path, "merged", [[0.5, 0.5]] * 2)
    episodes(tmp_path, "merged", [[0.2, 0.3, 0.5]] * 2, data="crops")
    with pytest.raises(UserError, match=r"mixtures of \[2, 3\] experts"):
        mixtures(tmp_path, merged, result("crops", "merged"))


def test_experts_are_drawn_in_the_order_of_the_pool(drawn, tmp_path):
    episodes(tmp_path, "merged", [[0.25, 0.75]] * 2)
    mixtures(tmp_path, result(arm="merged"), arms=("clean", "8", "0.1"))
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["8", "0.1"]


# ---- episodes


def panel(classes, size=16, attacked=True):
    generator = np.random.default_rng(0)
    images = generator.integers(20, 230, (2 * len(classes), 3, size, size), dtype=np.uint8)
    labels = np.repeat(np.arange(len(classes)), 2)
    arrays = {
        "model": np.array("merged"),
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
    episode_grid(panel(["cat", "a very long class name, really", "costs $5 or $6"]), tmp_path / "a.png")
    assert_readable(drawn[0])
    # 3 support images; 2 queries of 3 classes, each clean, attacked and changed: 3 + 2 * 3 * 3
    assert len(drawn[0].axes) == 21
    texts = [text for text, _ in visible_texts(drawn[0])]
    # the change is 4 of 255 everywhere: floor(127 / 4) = 31, drawn at 128 + 31 * 4 = 252
    assert texts.count("change × 31") == 2 and texts.count("merged") == 1
    assert np.asarray(drawn[0].axes[-1].images[0].get_array()).tolist() == [[[252] * 3] * 16] * 16
    # class 0 is right when clean and taken for class 1 when attacked
    assert texts.count("✓ cat") == 2 and texts.count("✗ cat") == 2 and "✗ a very long cl…" in texts
    from matplotlib.text import Text

    colors = {text.get_text(): text.get_color() for text in drawn[0].findobj(Text)}
    assert colors["✓ cat"] == plotting.RIGHT and colors["✗ cat"] == plotting.WRONG


def test_episode_without_attack_and_with_many_classes(drawn, tmp_path):
    episode_grid(panel([f"class {i}" for i in range(20)], attacked=False), tmp_path / "a.png")
    assert_readable(drawn[0])
    # 8 of 20 classes: one support and two queries each
    assert len(drawn[0].axes) == 8 * 3


def episode_arrays():
    labels = np.repeat(np.arange(5), 2)
    images = np.random.default_rng(0).integers(0, 250, (10, 3, 8, 8), dtype=np.uint8)
    return {
        "support": images[::2],
        "support_labels": labels[::2],
        "query": images,
        "query_labels": labels,
        "predictions": np.where(labels == 4, 0, labels),
        "adversarial": images + 5,
        "adversarial_predictions": np.where(labels == 0, 0, (labels + 1) % 5),
        "classes": np.array(list("abcde")),
        "condition": PGD.label,
    }


def test_episodes_of_a_report(tmp_path):
    (tmp_path / "panels").mkdir()
    np.savez(tmp_path / "panels" / "digits-5-way-1-shot.npz", model="average", **episode_arrays())
    section = shown(tmp_path, [])["Episodes"]
    (picture,) = section.pictures
    assert section.folded and picture.title == "digits-5-way-1-shot, average"
    assert "not chosen by result, average: " in picture.caption
    assert picture.path == tmp_path / "figures" / "episode-digits-5-way-1-shot.svg" and picture.path.exists()
    # 4 classes of 2 are right when clean, class 0 alone when attacked
    assert "Of 10 query images in the panel file, 8 are right, 2 under PGD-10" in picture.caption


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"PK\x03\x04 cut"),
        lambda path: np.savez(path, support=np.array([{}], dtype=object)),
    ],
)
def test_a_broken_episode_is_named(tmp_path, write):
    (tmp_path / "panels").mkdir()
    write(tmp_path / "panels" / "x.npz")
    with pytest.raises(UserError, match=r"x.npz' is not a panel") as caught:
        shown(tmp_path, [])
    assert "\n" not in str(caught.value) and "delete it and evaluate the run again" in str(caught.value)


def test_a_full_disk_is_not_a_broken_episode(tmp_path, monkeypatch):
    (tmp_path / "panels").mkdir()
    np.savez(tmp_path / "panels" / "digits.npz", **episode_arrays())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"^cannot write '.*episode-digits.svg': No space left on device"):
        shown(tmp_path, [])


def test_a_run_without_files_has_no_sections(tmp_path):
    assert not any(section.tables or section.pictures for section in shown(tmp_path, []).values())
