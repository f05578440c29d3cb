"""The sections about the trainings of a run: files with values of another type are refused with one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folder import make_folder

from vismt.base.errors import UserError
from vismt.engine.study import ARMS, CHOSEN
from vismt.engine.training_files import CHANGES, DONE, MERGE
from vismt.report.comparison import compare_results
from vismt.report.results import ValuesByExample, read_results
from vismt.report.run_list import list_runs
from vismt.report.trainings import Cost, cost_section, progress_section, read_costs, training_sections
from vismt.report.writer import run_heading
from vismt.storage.files import read_sealed, sealed
from vismt.storage.lines import read_lines, write_lines

ARM = f"{ARMS}/adapted"
TRAINING = f"{ARM}/lr-0.01-seed-0"
METRICS = "metrics.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path)
    training = folder / TRAINING
    training.mkdir(parents=True)
    (folder / ARM / CHOSEN).write_text(sealed({"lr": 0.01, "validation": {"0.01": 0.5, "0.1": None}}))
    (training / DONE).write_text(sealed({"method": "lora", "rank": 2, "trainable": 10, "total": 100, "files": {}}))
    merged = {"n": 4, "different_predictions": 0, "largest_difference": 1e-6, "largest_logit": 2.0, "outputs": {}}
    (training / MERGE).write_text(sealed(merged))
    write_lines(training / METRICS, [{"step": step, "loss": 1 / step, "elapsed_s": 1.0} for step in (1, 2, 3)])
    weights = [f"blocks.{number}.qkv.weight" for number in range(3)]
    write_lines(
        training / CHANGES, [{"weight": name, "norm": 2.0, "change": 1.0, "stable_rank": 1.5} for name in weights]
    )
    return folder


def show(folder: Path) -> str:
    """Read what a report reads of the trainings and of run.json; return the titles of what it shows."""
    sections = training_sections(folder, ["adapted"], 0, {"loss": "Training loss"})
    titles = [table.title for section in sections for table, _ in section.tables]
    return f"{titles} {len(run_heading(folder).facts)} {read_costs(folder, ['adapted'])}"


def test_a_whole_run_is_shown(folder: Path) -> None:
    assert show(folder).startswith("['Choice of the rate', 'Merged and unmerged', 'Changes of the weights'] ")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((f"{TRAINING}/{CHANGES}", key) for key in ("weight", "norm", "change", "stable_rank")),
        *((f"{TRAINING}/{METRICS}", key) for key in ("step", "loss")),
        *(
            (f"{TRAINING}/{MERGE}", key)
            for key in ("n", "different_predictions", "largest_difference", "largest_logit")
        ),
        (f"{TRAINING}/{MERGE}", "outputs"),
        (f"{TRAINING}/{DONE}", "trainable"),
        *((f"{ARM}/{CHOSEN}", key) for key in ("lr", "validation")),
        *(("run.json", key) for key in ("wall_time_s", "versions", "seed", "seeds", "evaluation_seed", "config_hash")),
        *(("run.json", key) for key in ("started", "hardware", "command")),
    ],
)
@pytest.mark.parametrize("value", [[["x"]], {"x": [None]}, True])
def test_a_value_of_another_type_is_refused_with_one_message(folder: Path, name: str, key: str, value: Any) -> None:
    path = folder / name
    if name.endswith(".jsonl"):
        write_lines(path, [{**row, key: value} for row in read_lines(path)])
    else:
        path.write_text(sealed({**read_sealed(path, "run"), key: value}))
    with pytest.raises(UserError, match=rf"{path.name}' .*does not have the content that a run writes: '{key}' is "):
        show(folder)
    assert len(list_runs(folder.parent)) == 1


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1e300])
def test_a_time_without_a_meaning_is_not_shown(folder: Path, seconds: float) -> None:
    path = folder / "run.json"
    path.write_text(sealed({**read_sealed(path, "run"), "wall_time_s": seconds}))
    assert "Wall time" not in dict(run_heading(folder).facts)


def test_costs_follow_from_the_files_of_the_trainings(folder: Path) -> None:
    """Time over the seeds, the largest memory, and the end of the grid at which the rate lies."""
    second = folder / f"{ARM}/lr-0.01-seed-1"
    second.mkdir()
    (second / DONE).write_bytes((folder / TRAINING / DONE).read_bytes())
    write_lines(folder / TRAINING / METRICS, [{"step": 1, "loss": 1.0, "elapsed_s": 2.0, "memory_mb": 90.0}])
    write_lines(second / METRICS, [{"step": at, "elapsed_s": 2.0 * at, "memory_mb": 100.0 / at} for at in (1, 2)])
    assert read_costs(folder, ["adapted", "unknown"]) == {"adapted": Cost(0.01, "lowest", 10, 3.0, 100.0)}
    (folder / ARM / CHOSEN).write_text(sealed({"lr": 0.01, "validation": {}}))
    assert read_costs(folder, ["adapted"])["adapted"].edge == ""
    (second / DONE).unlink()
    assert read_costs(folder, ["adapted"])["adapted"].seconds == 2.0


def test_scores_stand_beside_the_costs(folder: Path, drawn: list[Any]) -> None:
    results, values = read_results(folder / "results.jsonl"), ValuesByExample(folder)
    comparisons = compare_results(results, values)
    costs = {"adapted": Cost(0.01, "highest", 1_234_567, 7300.0, 2048.0), "frozen": Cost(0.1, "", 12, 60.0)}
    section = cost_section(folder, comparisons, costs)
    ((table, _),) = section.tables
    assert table.heads[-4:] == ["trained parameters", "time in h", "memory in MB", "learning rate"]
    assert table.rows[1][-4:] == ["1,234,567", "2.03", "2,048", "0.01 (highest of its grid)"]
    assert table.rows[0][-4:] == ["12", "0.0167", "–", "0.1"]
    assert "clean accuracy in % ↑" in table.heads and (1, table.heads.index("clean accuracy in % ↑")) in table.best
    # a figure needs two models that differ
    assert [picture.title for picture in section.pictures] == ["Score by trained parameters", "Score by time in h"]
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log" and len(axes.containers) == 2
    low, high = axes.get_ylim()
    for container in axes.containers:
        (place,) = container.lines[0].get_ydata()
        assert low < place < high
    assert not cost_section(folder, comparisons, {}).filled and not cost_section(folder, [], costs).filled


def test_an_unfinished_run_shows_its_curves(folder: Path, drawn: list[Any]) -> None:
    """Before a rate is chosen, the newest training of an arm is drawn."""
    (folder / ARM / CHOSEN).unlink()
    newer = folder / f"{ARM}/lr-0.1-seed-0"
    newer.mkdir()
    write_lines(newer / METRICS, [{"step": step, "loss": 5.0, "elapsed_s": 1.0} for step in (1, 2)])
    os.utime(newer / METRICS, (2e9, 2e9))
    training = training_sections(folder, ["adapted", "later"], 0, {"loss": "Training loss"})[0]
    assert [picture.title for picture in training.pictures] == ["Training"]
    assert drawn[0].axes[0].lines[0].get_ydata().tolist() == [5.0, 5.0]
    ((table, note),) = progress_section(folder, {"adapted": 40, "later": 40}).tables
    assert table.rows == [
        ["adapted", "lr-0.01-seed-0", "3 of 40", "0.3333"],
        ["adapted", "lr-0.1-seed-0", "2 of 40", "5"],
    ]
    assert "continues it" in note and not progress_section(folder, {"later": 40}).filled


def test_the_validation_scores_are_drawn_by_the_rate(folder: Path, drawn: list[Any]) -> None:
    scores = {"0.001": 0.5, "0.01": 0.7, "0.1": None}
    (folder / ARM / CHOSEN).write_text(sealed({"lr": 0.01, "validation": scores}))
    training = training_sections(folder, ["adapted"], 0, {"loss": "Training loss"})[0]
    assert [picture.title for picture in training.pictures] == ["Training", "Validation"]
    assert drawn[1].axes[0].lines[0].get_xydata().tolist() == [[0.001, 0.5], [0.01, 0.7]]
