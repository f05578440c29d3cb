"""The picture of what a language model forgot, from rows of results."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.readable import assert_readable, visible_texts
from helpers.results import result

from vismt.engine.study import Study
from vismt.jobs.lm import figures as lm_figures
from vismt.jobs.lm.config import LmConfig, LmTaskConfig
from vismt.jobs.lm.figures import sections
from vismt.report.results import Result
from vismt.storage.files import sealed

ARMS = {
    "lora-1e-3": {"adapt.method": "lora", "train.lr": 1e-3},
    "lora-2e-3": {"adapt.method": "lora", "train.lr": 2e-3},
    "kpm": {"adapt.method": "corda", "train.lr": 1e-3},
}
SCORES = {"lora-1e-3": (0.80, 36.0), "lora-2e-3": (0.70, 38.0), "kpm": (0.75, 40.0), "frozen": (1.6, 36.5)}


def row(arm: str, seed: int | None, task: str, data: str, metric: str, value: float) -> Result:
    return result(
        data, arm, value=value, seed=seed, task=task, metric=metric, scale="number", better="lower", chance=None, n=9
    )


def rows(seeds: tuple[int, ...] = (0, 1)) -> list[Result]:
    """Rows of two seeds and of their mean; frozen has one."""
    lines = []
    for arm, (nats, perplexity) in SCORES.items():
        trainings = [(seed, seed) for seed in seeds] if arm != "frozen" and len(seeds) > 1 else []
        for seed, step in [(None, sum(seeds) / len(seeds) if trainings else 0), *trainings]:
            lines.append(row(arm, seed, "sums", "sums:test", "NLL in nats a token", nats + step / 50))
            lines.append(row(arm, seed, "texts", "texts", "NLL in nats a token", 3.0))
            lines.append(row(arm, seed, "texts", "texts", "perplexity", perplexity + step))
    return lines


@pytest.fixture
def run(tmp_path: Path):
    """run(seeds, tasks): the configuration and the study of a run whose arms have their rates."""

    def make(seeds: list[int]) -> tuple[LmConfig, Study[LmConfig]]:
        config = LmConfig(arms=ARMS, seeds=seeds)
        config.tasks = [LmTaskConfig(name="texts"), LmTaskConfig(name="sums", train=["sums:train"])]
        for arm, changes in ARMS.items():
            path = tmp_path / "arms" / arm / "chosen.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sealed({"lr": changes["train.lr"], "validation": {}}))
        return config, Study(config, tmp_path, dict.fromkeys(ARMS, config))

    return make


@pytest.fixture
def figures(monkeypatch, painted) -> list:
    drawn, save = [], lm_figures.save_figure
    monkeypatch.setattr(lm_figures, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    return drawn


def test_forgetting_is_drawn_against_the_trained_task_by_families_of_one_rate_each(run, figures, tmp_path):
    (section,) = sections(tmp_path, *run([0, 1]), rows())
    assert [picture.title for picture in section.pictures] == ["Forgetting of texts"]
    assert section.pictures[0].path.exists()
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


def test_one_seed_has_its_rows_without_a_seed(run, figures, tmp_path):
    sections(tmp_path, *run([0]), rows((0,)))
    (axes,) = figures[0].axes
    assert [len(dots.get_offsets()) for dots in axes.collections] == [2, 1]


def test_no_picture_without_arms_or_without_the_trained_task(run, tmp_path):
    config, study = run([0, 1])
    assert sections(tmp_path, config, study, [entry for entry in rows() if entry.task != "sums"]) == []
    assert sections(tmp_path, config, study, []) == []
    study.arms = {}
    assert sections(tmp_path, config, study, rows()) == []
    (section,) = sections(tmp_path, *run([0, 1]), [entry for entry in rows() if entry.metric != "perplexity"])
    assert not section.pictures
