"""The pictures of a language-model run's report, from hand-made files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.readable import assert_readable, visible_texts

from vismt.jobs.lm import figures as lm_figures
from vismt.jobs.lm.report import lm_curves

ARMS = {
    "lora-1e-3": {"adapt.method": "lora", "train.lr": 1e-3},
    "lora-2e-3": {"adapt.method": "lora", "train.lr": 2e-3},
    "kpm": {"adapt.method": "corda", "train.lr": 1e-3},
}
SCORES = {"lora-1e-3": (0.80, 36.0), "lora-2e-3": (0.70, 38.0), "kpm": (0.75, 40.0), "frozen": (1.6, 36.5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for arm, (nats, perplexity) in SCORES.items():
        for seed in (0, 1) if arm != "frozen" else (0,):
            about = {
                "arm": arm,
                "seed": seed,
                "lr": ARMS.get(arm, {}).get("train.lr", 0.0),
                "condition": "clean",
                "n": 9,
            }
            about |= {"lower_is_better": True, "tokens": 90, "metric": "NLL in nats a token"}
            lines.append({**about, "task": "sums", "data": "sums:test", "value": nats + seed / 50})
            lines.append({**about, "task": "texts", "data": "texts", "value": 3.0})
            lines.append(
                {**about, "task": "texts", "data": "texts", "metric": "perplexity", "value": perplexity + seed}
            )
    (tmp_path / "lm_seeds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"name": "texts", "train": []}, {"name": "sums", "train": ["sums:train"]}]
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump({"tasks": tasks, "arms": ARMS}))
    return tmp_path


@pytest.fixture
def figures(monkeypatch) -> list:
    drawn, save = [], lm_figures.save
    monkeypatch.setattr(lm_figures, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
    return drawn


def test_forgetting_is_drawn_against_the_trained_task_by_families_of_one_rate_each(folder, figures):
    pictures = lm_curves(folder)
    assert [picture.title for picture in pictures] == ["Arms by seed", "Forgetting of texts"]
    (figure,) = figures
    assert_readable(figure)
    (axes,) = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines[0] == [
        pytest.approx([0.81, 36.5]),
        pytest.approx([0.71, 38.5]),
    ]  # means over the seeds, by rising rate
    assert lines[1] == [pytest.approx([0.76, 40.5])]
    assert (
        len(lines) == 3 and lines[2][0][1] == lines[2][1][1] == 36.5
    )  # frozen: its score lies outside, its perplexity inside
    assert [len(dots.get_offsets()) for dots in axes.collections] == [4, 2]
    texts = {text for text, _ in visible_texts(figure)}
    assert {"lora", "kpm", "0.001", "0.002"} <= texts and "lora-1e-3" not in texts
    assert (
        axes.get_xlabel() == "sums on sums:test: NLL in nats a token ↓" and axes.get_ylabel() == "texts: perplexity ↓"
    )


def test_no_picture_without_arms_or_without_the_trained_task(folder, tmp_path):
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump({"tasks": [], "arms": ARMS}))
    assert lm_curves(folder) == []
    (folder / "lm_seeds.jsonl").unlink()
    assert lm_curves(folder) == []
