"""`vismt list runs` and `clean`: what a folder of runs shows, and that nothing but stubs and caches is deleted."""

import json

import pytest
from helpers.run_folder import make_folder

from vismt.cli import main
from vismt.files import locked
from vismt.report.overview import list_runs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An evaluated run, a trained one, an interrupted one, a stub, and a folder that is no run."""
    parent = tmp_path / "runs"
    config = "task: fewshot\ntitle: Digits\n"
    for name in ("trained", "interrupted", "stub", "other"):
        (parent / name).mkdir(parents=True)
        if name != "other":
            (parent / name / "config.resolved.yaml").write_text(config)
    make_folder(parent)
    (parent / "run-4f2a" / "config.resolved.yaml").write_text(config)
    (parent / "trained" / "run.json").write_text(json.dumps({"adapt": {}}))
    (parent / "interrupted" / "records").mkdir()
    (parent / "interrupted" / "records" / "a.jsonl").write_text("")
    (parent / "stub" / "run.json").write_text("{}")
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "pixels").mkdir(parents=True)
    (tmp_path / "cache" / "pixels" / "a.npy").write_bytes(b"0" * 10)
    return parent


def test_every_run_has_a_line(runs, capsys):
    states = {row.folder.name: row.state for row in list_runs(runs)}
    assert states == {
        "run-4f2a": "evaluated",
        "trained": "trained",
        "interrupted": "interrupted",
        "stub": "nothing done",
    }
    assert main(["list", "runs", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "title", "job", "result", "state"] and len(lines) == 5
    line = next(line for line in lines if line.startswith("run-4f2a"))
    assert "Digits" in line and "fewshot" in line and "accuracy in % 56.2 ± 17.0 (adapted)" in line


def test_a_run_that_is_running_or_damaged_is_said_to_be(runs):
    (runs / "run-4f2a" / "results.jsonl").write_text("{}\n")
    with locked(runs / "stub"):
        states = {row.folder.name: row.state for row in list_runs(runs)}
    assert states["stub"] == "running" and "results.jsonl" in states["run-4f2a"]
    assert {row.state for row in list_runs(runs)} >= {"nothing done"}


def test_a_folder_without_runs(tmp_path, capsys):
    assert main(["list", "runs", "--runs", str(tmp_path)]) == 2
    assert f"no run folder in '{tmp_path}'" in capsys.readouterr().err


def test_clean_asks_for_each_folder(runs, monkeypatch, capsys):
    questions = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or ("y" if "stub" in text else ""))
    assert main(["clean", "--runs", str(runs)]) == 0
    assert len(questions) == 2 and "stub" in questions[0] and "pixels" in questions[1]
    assert {path.name for path in runs.iterdir()} == {"run-4f2a", "trained", "interrupted", "other"}
    assert (runs.parent / "cache" / "pixels" / "a.npy").exists()
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    assert not list((runs.parent / "cache").iterdir())
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert {path.name for path in runs.iterdir()} == {"run-4f2a", "trained", "interrupted", "other"}


def test_clean_without_a_terminal_deletes_nothing(runs, monkeypatch, capsys):
    def closed(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert main(["clean", "--runs", str(runs)]) == 2
    assert "--yes" in capsys.readouterr().err and (runs / "stub").is_dir()
