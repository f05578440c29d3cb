"""What a report answers in a run: which model to take, and how far a run is that is not finished."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_runs import CONFIGS, SHORT, interrupted, run_config, written

from vismt.cli import main
from vismt.jobs import open_run
from vismt.report.panels import read_panel
from vismt.report.results import read_results
from vismt.storage.lines import read_lines
from vismt.storage.locks import locked

STUDY = {
    **CONFIGS["multitask"],
    "model": SHORT,
    "tasks": CONFIGS["multitask"]["tasks"][:1],
    "arms": {"heads": {"adapt": None, "fade": None}, "emtal": {}},
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_config(written(tmp_path_factory.mktemp("run") / "study.yaml", STUDY))


def test_the_console_ends_with_the_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    answer, *paths = capsys.readouterr().out.splitlines()
    text = (run / "report.md").read_text()
    assert answer.startswith("answer  Take ") and answer.removeprefix("answer  ") in text.replace("\\", "")
    assert [Path(path.split()[1]).name for path in paths] == ["report.md", "report.html"]
    assert "| Model | accuracy in % ↑ | trained parameters | time in s |" in text and "| learning rate |" in text


def test_the_next_commands_run_as_they_stand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "```bash" not in (run / "report.md").read_text()  # after three steps no model is told from a constant answer
    commands = open_run(run).job.commands("emtal")
    assert [command.split()[1] for command in commands] == ["predict", "export", "merge", "compare"]
    for command in commands[1:3]:
        assert main(command.split()[1:]) == 0, command
    arm = commands[1].split("--arm ")[1].split()[0]
    assert (run / f"merged-{arm}-seed-0").is_dir() and (run / f"export-timm-{arm}-seed-0").is_dir()
    capsys.readouterr()


def test_the_counts_of_the_classes_give_the_accuracy(run: Path) -> None:
    panel = read_panel(run / "classes" / "digits.npz")
    rows = {
        row.arm: row for row in read_results(run / "results.jsonl") if row.seed is None and row.metric == "accuracy"
    }
    assert panel["arms"].tolist() == ["heads", "emtal"] and panel["classes"].tolist() == [str(i) for i in range(10)]
    for arm, counts in zip(panel["arms"].tolist(), panel["counts"], strict=True):
        assert counts.sum() == 2 * rows[arm].n  # two seeds
        assert counts.trace() / counts.sum() == pytest.approx(rows[arm].value)


def test_a_training_records_its_memory(run: Path) -> None:
    for path in (run / "arms").glob("*/*/metrics.jsonl"):
        memory = [row["memory_mb"] for row in read_lines(path)]
        assert memory == sorted(memory) and 50 < memory[0] < 1e6


def test_a_run_that_goes_on_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the second arm; another process may hold the folder."""
    interrupted(
        monkeypatch, 2, "train", written(tmp_path / "a.yaml", STUDY), "--out", tmp_path / "runs", inside="emtal"
    )
    (folder,) = (tmp_path / "runs").iterdir()
    before = {path: path.read_bytes() for path in (folder / "arms").rglob("*") if path.is_file()}
    capsys.readouterr()
    with locked(folder):
        assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html")
    text = (folder / "report.md").read_text()
    for row in (
        "| heads | lr-0.01-seed-0 | 3 of 3 |",
        "| heads | lr-0.01-seed-1 | 3 of 3 |",
        "| emtal | lr-0.01-seed-0 | 2 of 3 |",
    ):
        assert row in text
    assert "(figures/training.svg)" in text and "Take " not in text and "## Results" not in text
    assert before == {path: path.read_bytes() for path in (folder / "arms").rglob("*") if path.is_file()}
    # the run then goes on, and its report answers
    assert main(["run", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    assert (
        "Take " in (folder / "report.md").read_text() and "Trainings so far" not in (folder / "report.md").read_text()
    )
