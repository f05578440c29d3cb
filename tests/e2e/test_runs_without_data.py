"""A finished run predicts and exports in another folder, without its data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.room import dense, made_room
from helpers.tiny_runs import FEWSHOT, SHORT, TRAIN, refused, run_config, written

import vismt
from vismt.cli import main
from vismt.engine.study import ARMS
from vismt.jobs.training_job import SETS

LORA = {"method": "lora", "rank": 2}


def made(job: str, home: Path) -> dict[str, Any]:
    """Write the data of a job; return its configuration, with paths from the folder of the configuration."""
    parts = {
        part: [f"./tones:{split}"] for part, split in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    if job == "lm":
        save_texts(home)
        (home / "data").mkdir()
        task = sentiment_task("./films", validation=["./films:dev"])
        model = {"name": str(save_lm(home.parent / "model"))}
        adapt = {**LORA, "targets": ["q_proj"]}
        evaluate = {"batch": 4, "temperature": True}
        head = {"name": "vbll"}
        common: dict[str, Any] = {"task": job, "model": model, "adapt": adapt, "train": TRAIN, "batch": 2, "head": head}
        return {**common, "evaluate": evaluate, "tasks": [task]}
    made_room(home)
    if job == "fewshot":
        ways = {"ways": 2, "shots": 1, "queries": 2}
        source = {"source": {"data": ["./tones:train"], **ways, "augment": False}}
        evaluate = {"data": ["./reds:test"], **ways, "shots": [1], "episodes": 3}
        return {**FEWSHOT, **source, "model": {**SHORT, "block": 0}, "select": None, "evaluate": evaluate}
    if job == "classification":
        common = {"task": job, "model": SHORT, "adapt": LORA, "batch": 4, "train": TRAIN}
        return {**common, "tasks": [{"name": "tones", **parts}], "evaluate": {"risk": True, "temperature": True}}
    tasks = [{"name": "semseg", "classes": 3}, {"name": "tones", **parts}]
    data = {part: [entries[0].replace("tones", "scenes")] for part, entries in parts.items()}
    return dense(home, data=data, tasks=tasks, evaluate={"risk": True})


@pytest.mark.parametrize("job", ["classification", "dense", "fewshot", "lm"])
def test_a_finished_run_needs_no_data(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    monkeypatch.setenv("VISMT_DATA", str(home / "data"))
    monkeypatch.chdir(home)
    run = run_config(written(Path("run.yaml"), made(job, home))).resolve()
    inputs, form = sorted((home / "data" / "tones" / "test").rglob("*.png")), "timm"
    options: dict[str, Any] = {}
    if job == "lm":
        inputs, form = [home / "films" / "rows" / "test.jsonl"], "transformers"
    mine = [Path(shutil.copy(path, other / f"{number}{path.suffix}")) for number, path in enumerate(inputs)]
    if job == "fewshot":
        options["support"] = Path(shutil.copytree(home / "data" / "tones" / "train", other / "support"))
    before = vismt.predict(run, mine, to=other / "before", **options).rows
    assert main(["export", str(run), "--format", form, "--to", str(other / "kept")]) == 0
    moved = Path(shutil.copytree(run, other / run.name))
    shutil.rmtree(home)
    monkeypatch.delenv("VISMT_DATA")
    monkeypatch.chdir(other)
    assert vismt.predict(moved, mine, to=other / "after", **options).rows == before
    assert main(["export", str(moved), "--format", form, "--to", str(other / "again")]) == 0
    for path in (other / "kept").rglob("*"):
        assert path.name == "README.md" or path.read_bytes() == (other / "again" / path.name).read_bytes(), path
    if job == "classification":
        (moved / ARMS / SETS).unlink()
        error = refused(capsys, "export", moved, "--format", form, "--to", other / "third")
        assert "trained by an earlier version" in error and "put the data back" in error


def test_paths_of_a_run_hold_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("VISMT_DATA", str(home / "data"))
    monkeypatch.chdir(home)
    run = run_config(written(Path("run.yaml"), made("classification", home))).resolve()
    (other := tmp_path / "other").mkdir()
    monkeypatch.chdir(other)
    assert main(["evaluate", str(run)]) == 0
