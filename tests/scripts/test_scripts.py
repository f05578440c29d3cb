"""The scripts turn their flags into a valid configuration, and the job runs from there."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from vismt.jobs import load_config, make_job
from vismt.report.results import read_results

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STARTED = sorted(path.name for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf8"))
COMMON = ["--model", "test_vit", "--data", "motorcycle", "--size", "32", "48"]


def settings(script: str, flags: list[str], folder: Path, monkeypatch) -> dict:
    """Return the configuration that a script makes from its flags, after its job has checked it."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    names = runpy.run_path(str(SCRIPTS / script))
    raw = names["config"](names["arguments"]())
    path = folder / "script.yaml"
    path.write_text(yaml.safe_dump(raw))
    make_job(load_config(path, []), folder)
    return raw


def test_train_dense_flags(tmp_path: Path, monkeypatch) -> None:
    raw = settings(
        "train_dense.py",
        [*COMMON, "--tasks", "semseg:5", "depth", "--method", "emtal", "--balancing", "dwa"],
        tmp_path,
        monkeypatch,
    )
    assert raw["tasks"] == [{"name": "semseg", "classes": 5}, {"name": "depth"}]
    assert raw["adapt"] == {"method": "emtal", "rank": 8} and raw["fade"] == {}
    assert raw["balancing"] == {"method": "dwa"}
    assert raw["data"] == {"train": ["motorcycle:train"], "test": ["motorcycle:test"]}
    raw = settings("train_dense.py", [*COMMON, "--tasks", "depth", "--method", "full"], tmp_path, monkeypatch)
    assert raw["adapt"] == {"method": "full", "rank": 8} and raw["fade"] is None


def test_a_task_of_train_dense_has_a_number_of_classes(tmp_path: Path, monkeypatch, capsys) -> None:
    for tasks, words in (
        (["semseg:abc"], "semseg: classes 'abc'; it must be a whole number"),
        (["depth", "classify:1.5"], "classify: classes 1.5; it must be a whole number"),
        (["semseg"], "task: 'semseg' needs 'classes'"),
    ):
        flags = [*COMMON, "--tasks", *tasks, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["train_dense.py", *flags])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(SCRIPTS / "train_dense.py"), run_name="__main__")
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["train_dense.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPTS / "train_dense.py"), run_name="__main__")
    assert "classify:CLASSES" in capsys.readouterr().out


def test_bench_fewshot_flags(tmp_path: Path, monkeypatch) -> None:
    flags = ["--model", "test_vit", "--data", "digits", "--episodes", "3", "--epsilon", "8/255"]
    raw = settings("bench_fewshot.py", flags, tmp_path, monkeypatch)
    assert raw["train"] is None and raw["evaluate"]["attacks"] == [{"name": "pgd", "epsilon": "8/255"}]


@pytest.mark.slow
def test_train_dense_runs_to_its_report(tmp_path: Path, monkeypatch) -> None:
    words = ["--random-weights", "--tasks", "depth", "--head", "linear", "--steps", "2", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", ["train_dense.py", *COMMON, *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "train_dense.py"), run_name="__main__")
    assert not ended.value.code
    folder = next(tmp_path.iterdir())
    rows = [row for row in read_results(folder / "results.jsonl") if not row.further and row.arm != "constant"]
    assert (folder / "report.html").exists() and len(rows) == 1


@pytest.mark.parametrize("script", STARTED)
def test_a_script_starts(script: str, monkeypatch, capsys) -> None:
    """--help imports what the script needs, prints its flags, and does none of its work."""
    for folder in ("tests", "tests/faults"):
        monkeypatch.syspath_prepend(str(SCRIPTS.parent / folder))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert not ended.value.code and capsys.readouterr().out.startswith("usage: ")
