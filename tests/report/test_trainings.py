"""The sections about the trainings of a run: files with values of another type are refused with one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.run_folder import make_folder

from vismt.base.errors import UserError
from vismt.engine.study import ARMS, CHOSEN
from vismt.engine.training_files import CHANGES, DONE, MERGE
from vismt.report.run_list import list_runs
from vismt.report.trainings import training_cost, training_sections
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
    return f"{titles} {len(run_heading(folder).facts)} {training_cost(folder, 'adapted')}"


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
