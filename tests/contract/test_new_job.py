"""A new job is a configuration and a few methods: arms, seeds, rates, resuming, intervals, report and merging come with it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from helpers.tiny_runs import refused, written
from helpers.toy_job.job import ToyJob

import vismt.jobs
from vismt.cli import main
from vismt.engine import runtime
from vismt.engine.study import read_choice
from vismt.report.results import read_results
from vismt.storage.files import file_digest
from vismt.storage.lines import read_lines

CONFIG = {
    "task": "toy",
    "adapt": {"method": "lora", "rank": 2},
    "train": {"steps": 30, "log_every": 10, "checkpoint_every": 15},
    "arms": {"relu": {}, "gelu": {"activation": "gelu"}},
    "seeds": [0, 1],
    "tune": {"rates": [0.003, 0.03]},
}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vismt.jobs.JOBS, "toy", "helpers.toy_job")


def test_a_toy_job_runs_reports_merges_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "toy.yaml", CONFIG)
    command = ["run", str(path), "--out", str(tmp_path / "runs")]
    assert main(command) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    rows = {(row.arm, row.seed): row for row in read_results(folder / "results.jsonl")}
    assert set(rows) == {(arm, seed) for arm in ("relu", "gelu") for seed in (None, 0, 1)}
    row = rows["relu", None]
    assert row.n == 40 and 0.8 < row.value <= 1 and row.low <= row.value <= row.high
    report = (folder / "report.md").read_text()
    assert all(words in report for words in ("one of 2 numbers", "relu", "gelu", "Differences", "2 seeds"))
    assert main(["merge", str(folder), "--arm", "gelu:1", "--quiet"]) == 0
    assert (folder / "merged-gelu-seed-1" / "model.safetensors").exists()
    assert re.search("^device  .* process.es.\n", capsys.readouterr().out)
    assert main(command) == 0 and re.search("^train   done before", capsys.readouterr().out)
    monkeypatch.setattr(runtime, "hardware", lambda: "another machine")
    assert main(command) == 0
    assert "another machine   (before: " in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_the_time_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(job: ToyJob, objective: object, number: int) -> None:
        if number in (1, 16):  # the checkpoint is after step 15
            times.append(json.loads((job.folder / "run.json").read_text())["wall_time_s"])
        if number == 16:
            raise KeyboardInterrupt
        time.sleep(0.01)

    times: list[float] = []
    path = written(tmp_path / "toy.yaml", CONFIG)
    monkeypatch.setattr(ToyJob, "step", stop)
    assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 130
    assert times[1] - times[0] > 0.15


@pytest.mark.slow
def test_the_validation_curve_of_a_run_is_that_of_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve survives an interruption, ends at the score that chose the rate, and changes no weight."""

    def stop(job: ToyJob, objective: object, number: int) -> None:
        if number == 16:
            raise KeyboardInterrupt

    def run(name: str, validate: bool) -> tuple[Path, int]:
        train = {"steps": 30, "checkpoint_every": 10, "validate": validate}
        path = written(tmp_path / f"{name}.yaml", CONFIG | {"train": train})
        code = main(["run", str(path), "--out", str(tmp_path / name), "--quiet"])
        return next((tmp_path / name).iterdir()), code

    def curve(training: Path) -> list[dict]:
        return read_lines(training / "validation.jsonl", {"step": int, "validation": float}, whole=True)

    with monkeypatch.context() as patch:
        patch.setattr(ToyJob, "step", stop)
        assert run("stopped", validate=True)[1] == 130
    (stopped, _), (whole, _), (plain, _) = run("stopped", True), run("whole", True), run("plain", False)
    for arm in ("relu", "gelu"):
        choice = read_choice(whole, arm)
        name = f"lr-{choice.lr:g}-seed-0"
        paths = [folder / "arms" / arm / name for folder in (stopped, whole, plain)]
        rows = curve(paths[1])
        assert curve(paths[0]) == rows and [row["step"] for row in rows] == [10, 20, 30]
        assert rows[-1]["validation"] == choice.validation[f"{choice.lr:g}"] > rows[0]["validation"]
        assert len({file_digest(path / "head.safetensors") for path in paths}) == 1
        assert not curve(paths[2])
    assert not [*whole.glob("arms/*/*/steps")] and len([*whole.glob("arms/*/*/validation.jsonl")]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "toy.yaml: batch is 0; it must be at least 1."),
        ({"activation": "rely"}, "toy.yaml: activation: 'rely' is not known. Near: 'relu', 'gelu'."),
        ({"arms": {"a": {"evaluate.examples": 3}}}, "must be the same for all arms"),
        ({"train": None}, "give train and adapt"),
        ({"adapt": {"method": "lorra"}}, "adapt.method: 'lorra' is not known. Near: 'lora'"),
    ],
)
def test_what_the_sections_of_a_toy_job_refuse(tmp_path: Path, capsys, changes: dict, words: str) -> None:
    path = written(tmp_path / "toy.yaml", CONFIG | changes)
    assert words in refused(capsys, "run", path, "--out", tmp_path / "runs") and not (tmp_path / "runs").exists()


def test_a_toy_job_has_a_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "toy", "evaluate"]) == 0
    assert "evaluate.examples   int, at least 2   default: 40" in capsys.readouterr().out


def test_a_toy_job_has_a_template_of_its_own(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "toy", "--to", str(tmp_path)]) == 0
    assert "vismt run toy.yaml" in capsys.readouterr().out
    assert vismt.jobs.load_config(tmp_path / "toy.yaml").batch == 16
    assert "toy takes no data, not --images" in refused(capsys, "init", "toy", "--images", tmp_path)
    monkeypatch.setitem(vismt.jobs.JOBS, "bare", "helpers")
    assert "the job 'bare' has no template; write a configuration" in refused(capsys, "init", "bare", "--to", tmp_path)
