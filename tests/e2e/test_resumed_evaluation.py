"""An evaluation that is stopped in the middle of every set goes on at the next batch, and writes the files of one that is not."""

from __future__ import annotations

import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
from helpers.tiny_runs import evaluated_configs, files, written

from vismt.cli import main
from vismt.jobs import open_run
from vismt.report.results import RESULTS
from vismt.storage.lines import LineFile

JOBS = ("fewshot", "lm", "robustness", *(pytest.param(job, marks=pytest.mark.slow) for job in ("dense", "multitask")))
BEFORE = 2  # batches of a set


def trained(job: str, folder: Path) -> tuple[Path, Path]:
    """Train a run of a job; return its folder and a copy."""
    config = written(folder / f"{job}.yaml", evaluated_configs(folder)[job])
    assert main(["train", str(config), "--out", str(folder / "runs"), "--quiet"]) == 0
    run = next((folder / "runs").iterdir())
    return run, Path(shutil.copytree(run, folder / "stopped" / run.name))


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of an evaluated run but those with times."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder) if path.name != "run.json"}


class Added:
    """Counts the batches that are added to each file; `stop` is called after BEFORE batches of one."""

    def __init__(self, stop) -> None:
        self.batches: dict[Path, int] = {}
        self.stopped: set[Path] = set()
        self.stop, self.add = stop, LineFile.add

    def __call__(self, lines: LineFile, *rows: dict) -> None:
        self.add(lines, *rows)
        self.batches[lines.path] = self.batches.get(lines.path, 0) + 1
        if self.batches[lines.path] == BEFORE and lines.path not in self.stopped:
            self.stopped.add(lines.path)
            self.stop()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("job", JOBS)
def test_stopped_in_every_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    whole, stopped = trained(job, tmp_path)
    counts, added = Added(lambda: None), Added(interrupt)
    monkeypatch.setattr(LineFile, "add", lambda self, *rows: counts(self, *rows))
    open_run(whole).evaluate()
    monkeypatch.setattr(LineFile, "add", lambda self, *rows: added(self, *rows))
    interruptions = 0
    while True:
        try:
            open_run(stopped).evaluate()
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == len(added.stopped) > 0 and max(counts.batches.values()) > BEFORE
    expected = content(whole)
    found = content(stopped)
    assert found.keys() == expected.keys() and [name for name in expected if found[name] != expected[name]] == []
    # No batch was run twice.
    relative = [
        {path.relative_to(of): n for path, n in counted.batches.items()}
        for of, counted in ((whole, counts), (stopped, added))
    ]
    assert relative[0] == relative[1]


def _killed(folder: Path) -> None:
    added = Added(lambda: os.kill(os.getpid(), signal.SIGKILL))
    LineFile.add = lambda self, *rows: added(self, *rows)  # type: ignore[method-assign]
    open_run(folder).evaluate()


@pytest.mark.slow
def test_killed_in_a_set(tmp_path: Path) -> None:
    whole, stopped = trained("fewshot", tmp_path)
    open_run(whole).evaluate()
    process = get_context("fork").Process(target=_killed, args=(stopped,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (stopped / RESULTS).exists()
    open_run(stopped).evaluate()
    assert content(stopped) == content(whole)
