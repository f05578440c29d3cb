"""A study in several processes: the files of one process, failures named, wrong command lines refused."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.tiny_runs import refused, written
from helpers.units import die, mark, sleep

from vismt.base.errors import Diverged, UserError
from vismt.cli import main
from vismt.engine.study import Training
from vismt.engine.workers import LocalWorkers, _start, make_workers
from vismt.jobs import units
from vismt.jobs.fewshot.job import FewShotJob
from vismt.report.results import RESULTS
from vismt.storage.locks import locked

CONFIG = {
    "model": {"name": "test_vit", "img_size": 32, "pretrained": False, "block": 3},
    "adapt": {"method": "lora", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False},
    "arms": {"lora": {}, "wide": {"adapt.rank": 4}},
    "seeds": [0, 1],
    "tune": {"rates": [1.0e-3, 1.0e-2]},
    "select": {"data": ["photo_crops:test"], "episodes": 2},
    "train": {"steps": 2},
    "evaluate": {"data": ["digits"], "ways": 3, "shots": [1], "queries": 2, "episodes": 4},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("study") / "study.yaml", CONFIG)


@pytest.fixture(scope="module")
def expected(config: Path) -> dict[str, bytes]:
    """The files of one process."""
    assert main(["run", str(config), "--out", str(config.parent / "one"), "--quiet"]) == 0
    return files(config.parent / "one")


def files(out: Path) -> dict[str, bytes]:
    """Return what a run computed: results, records, choices and adapters by name."""
    folder = next(out.iterdir())
    kept = [folder / RESULTS, *folder.glob("arms/*/chosen.json"), *folder.glob("arms/*/*/adapter/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*kept, *folder.glob("episodes/*/*")]}


@pytest.mark.slow
def test_local_workers_write_the_files_of_one_process(config: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert main(["run", str(config), "--out", str(tmp_path), "--quiet", "--workers", "2"]) == 0
    assert files(tmp_path) == expected
    assert sum(name.endswith(".safetensors") for name in expected) == 6  # two arms: two rates, then another seed
    assert (next(tmp_path.iterdir()) / "report.html").exists()


@pytest.mark.slow
def test_parts_share_the_units_and_wait_for_each_other(
    config: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    call = [sys.executable, "-m", "vismt.cli", "run", str(config), "--out", str(tmp_path), "--quiet", "--part"]
    parts = [subprocess.Popen([*call, f"{part}/2"]) for part in (1, 2)]
    assert [part.wait(200) for part in parts] == [0, 0]
    folder = next(tmp_path.iterdir())
    assert not (folder / RESULTS).exists()
    assert main(["report", str(folder), "--quiet"]) == 0
    assert files(tmp_path) == expected


def test_a_rate_that_diverged_is_not_trained_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_one = FewShotJob.train_one
    rates = []

    def diverge(job: FewShotJob, training: Training) -> None:
        rates.append(training.lr)
        if training.lr > 5e-3:
            raise Diverged("train: the loss is not finite.")
        train_one(job, training)

    monkeypatch.setattr(FewShotJob, "train_one", diverge)
    options = ["run", str(config), "arms={lora: {}}", "seeds=[0]", "--out", str(tmp_path), "--quiet"]
    assert main(options) == 0
    assert rates.count(1e-2) == 1
    folder = next(tmp_path.iterdir())
    chosen = json.loads((folder / "arms" / "lora" / "chosen.json").read_text())
    assert chosen["lr"] == 1e-3 and chosen["validation"]["0.01"] is None
    for name in ("run.json", "arms/lora/chosen.json"):
        (folder / name).unlink()
    assert main(options) == 0
    assert rates.count(1e-2) == 1


def test_a_killed_worker_s_unit_runs_once_more_and_the_others_are_kept(tmp_path: Path) -> None:
    with LocalWorkers(2) as workers:
        workers.run({"dies once": (die, (tmp_path / "once", 1)), "other": (mark, (tmp_path / "other",))})
        assert (tmp_path / "once").read_text() == "2" and (tmp_path / "other").exists()
        with pytest.raises(UserError, match=r"1 of 2 units failed twice.*dies twice: its process ended"):
            workers.run({"dies twice": (die, (tmp_path / "twice", 9)), "third": (mark, (tmp_path / "third",))})
        assert (tmp_path / "twice").read_text() == "2" and (tmp_path / "third").exists()


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Also in the middle of a unit."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom helpers.units import sleep\nfrom vismt.engine.workers import LocalWorkers\n"
        "if __name__ == '__main__':\n"
        "    with LocalWorkers(2) as workers:\n"
        "        workers.run({name: (sleep, (Path(sys.argv[1]) / name, 300)) for name in 'ab'})\n"
    )
    (tmp_path / "parent.py").write_text(script)
    call = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    parent = subprocess.Popen(call, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    ends_with(parent.pid, [tmp_path / "a", tmp_path / "b"], signal.SIGTERM)
    assert parent.wait(10) == -signal.SIGTERM


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=_parent_of_a_worker, args=(tmp_path / "a",))
    parent.start()
    ends_with(parent.pid, [tmp_path / "a"], signal.SIGKILL)
    parent.join(10)
    assert parent.exitcode == -signal.SIGKILL


def _parent_of_a_worker(path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_worker, args=(path,))
    worker.start()
    worker.join()


def _worker(path: Path) -> None:
    _start(1, None)
    sleep(path, 60)


def ends_with(parent: int, files: list[Path], stop: signal.Signals) -> None:
    """Send a signal to a process once workers have written their numbers into files; fail where they live on."""
    within(60, lambda: all(file.exists() for file in files))
    workers = [psutil.Process(int(file.read_text())) for file in files]
    os.kill(parent, stop)
    within(10, lambda: not any(worker.is_running() for worker in workers))


def within(seconds: float, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_part_does_not_wait_for_parts_that_nobody_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(units, "ABSENT_S", 0.2)
    monkeypatch.setattr(units, "POLL_S", 0.05)
    assert main(["run", str(config), "--out", str(tmp_path), "--part", "9/9"]) == 2
    shown = capsys.readouterr()
    assert "wait" in shown.out and "not running: 1/9, 2/9, 3/9, 4/9" in shown.out
    assert "4 training(s) of part 1/9, 2/9, 3/9, 4/9 missing" in shown.err and shown.err.count("\n") == 1


def test_a_part_waits_for_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "ABSENT_S", 0.1)
    monkeypatch.setattr(units, "POLL_S", 0.02)
    owed = iter([[1, 2]] * 20)
    with locked(tmp_path / "parts" / "2-of-2"):
        units._wait(tmp_path, 2, lambda: next(owed, []), "training(s)")
    owed = iter([[1, 2]] * 20)
    with pytest.raises(UserError, match=r"2 training.* of part 1/2, 2/2 missing"):
        units._wait(tmp_path, 2, lambda: next(owed, []), "training(s)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "9"], "9 processes for 6 units"),
        (["--workers", "0"], "give a number of processes"),
        (["--workers", "two"], "give a number of processes"),
        (["--part", "3/2"], "the parts of 2 are 1 to 2"),
        (["--part", "1"], "give i/n"),
        (["--part", "1/2", "--workers", "2"], "exclude each other"),
    ],
)
def test_wrong_numbers_are_one_line(
    options: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "run", config, "--out", tmp_path, *options)


def test_a_ray_cluster_that_does_not_answer_is_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        make_workers("ray:127.0.0.1:1", 4)


@pytest.mark.slow
def test_a_local_ray_writes_the_files_of_one_process(config: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert main(["run", str(config), "--out", str(tmp_path), "--quiet", "--workers", "ray"]) == 0
    assert files(tmp_path) == expected and (next(tmp_path.iterdir()) / "report.html").exists()


@pytest.mark.campaign
def test_a_study_on_ray_survives_a_killed_worker(config: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    call = [sys.executable, "-m", "vismt.cli", *f"run {config} --out {tmp_path} --quiet --workers ray".split()]
    study = subprocess.Popen(call)
    killed = False
    while study.poll() is None:
        for process in [] if killed else psutil.Process(study.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == ["ray::_run"]:
                    process.kill()
                    killed = True
                    break
        time.sleep(0.05)
    assert killed and study.returncode == 0
    assert files(tmp_path) == expected
