"""Ctrl-C and SIGTERM in a training: its step is saved, and the training goes on to the same bytes."""

from __future__ import annotations

import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import HELPERS, run_two
from helpers.tiny_runs import outcome, write_config
from helpers.toy_training import Toy, batches, logged, run, train

from vismt.base import console
from vismt.cli import main
from vismt.engine import checkpoint, loop
from vismt.storage.files import read_sealed, sealed


def interrupted(folder: Path, stop_after: int, number: int, **settings: Any) -> None:
    """Train as `run` does; the process gets the signal in the midst of a step after `stop_after`."""

    def batch(at: int) -> torch.Tensor:
        if at == stop_after + 1:  # which a thread prepares while the step before is computed
            signal.raise_signal(number)
        return batches(at)

    settings = {"steps": 8, "lr": 0.05, "warmup": 2, "checkpoint_every": 3, **settings}
    train(Toy(), batch, folder, **settings)


def trained(folder: Path) -> dict[str, Any]:
    return {"files": {path.name: path.read_bytes() for path in checkpoint.checkpoints(folder)}, "log": logged(folder)}


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 50}, {"log_every": 4}], ids=str)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_a_signal_in_a_training_saves_its_step_and_the_rest_is_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, settings: dict[str, Any], stop_after: int
) -> None:
    whole = run(tmp_path / "whole", **settings)
    process = get_context("fork").Process(
        target=interrupted, args=(tmp_path / "cut", stop_after, number), kwargs=settings
    )
    process.start()
    process.join(60)
    assert process.exitcode == (1 if number == signal.SIGINT else -number)
    output = capfd.readouterr()
    step = int(checkpoint.checkpoints(tmp_path / "cut")[0].name.split("-")[1])
    line = f"training '{tmp_path / 'cut'}' continues after step {step} of 8"
    assert stop_after <= step <= stop_after + 2
    assert (f"KeyboardInterrupt: {line}" in output.err) == (number == signal.SIGINT)
    assert (f"train   stopped: {line}" in output.out) == (number == signal.SIGTERM)
    cut = run(tmp_path / "cut", **settings)
    output = capfd.readouterr().out
    assert f"at step {step} of 8" in output and "lacks rows" not in output
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), cut.parameters()))
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


class Impatient(Toy):
    """Gets Ctrl-C twice in its fourth step."""

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.steps = getattr(self, "steps", 0) + 1
        for _ in range(2 if self.steps == 4 else 0):
            signal.raise_signal(signal.SIGINT)
        return super().forward(batch)


@pytest.mark.parametrize("every, place", [(50, "at its first step"), (2, "after step 2 of 8")])
def test_a_second_signal_acts_at_once_and_names_the_last_checkpoint(tmp_path: Path, every: int, place: str) -> None:
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"continues {place}$"):
        train(Impatient(), batches, tmp_path, steps=8, checkpoint_every=every)
    assert signal.getsignal(signal.SIGINT) is usual and len(checkpoint.checkpoints(tmp_path)) == (every == 2)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupted(tmp_path / "cut", 3, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
    run(tmp_path / "whole")
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


@pytest.mark.parametrize("job", ["multitask", pytest.param("pool", marks=pytest.mark.slow)])
def test_ctrl_c_in_a_training_and_in_an_evaluation_says_what_is_true_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    options = [str(write_config(job, tmp_path)), "train.checkpoint_every=50"]
    assert main(["run", *options, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    step, advance = loop._Training._step, console.Bar.advance

    def stopping(self: loop._Training, number: int) -> Any:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    def interrupted(self: console.Bar, steps: int = 1) -> None:
        advance(self, steps)
        if self._label.startswith("eval"):
            signal.raise_signal(signal.SIGINT)

    command = ["run", *options, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_step", stopping)
        assert main(command) == 130
    *_, error = capsys.readouterr().err.splitlines()  # after what a library prints
    assert error.startswith("error: interrupted. Run the same command again: training '")
    assert error.endswith("' continues after step 2 of 3.")
    with monkeypatch.context() as patch:
        patch.setattr(console.Bar, "advance", interrupted)
        assert main(command) == 130
    output = capsys.readouterr()
    assert "at step 2 of 3" in output.out
    assert output.err.endswith("error: interrupted. Run the same command again: it keeps what is finished.\n")
    assert main(command) == 0
    assert outcome(next((tmp_path / "cut").iterdir())) == outcome(next((tmp_path / "whole").iterdir()))


def test_trainings_that_two_processes_began_are_not_continued_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step takes a batch of each process: the arms would be trained on different numbers of images."""
    command = ["run", str(write_config("fewshot", tmp_path)), "--out", str(tmp_path / "runs"), "--quiet"]
    assert main(["train", *command[1:]]) == 0
    folder = next((tmp_path / "runs").iterdir())
    record = folder / "arms" / "processes.json"
    assert read_sealed(record, "run") == {"processes": 1}
    record.write_text(sealed({"processes": 2}))
    assert main(command) == 0  # the trainings are finished
    (folder / "run.json").unlink()
    next(folder.glob("arms/*/*/done.json")).unlink()
    assert main(command) == 2
    message = "2 process(es) began its trainings, and this launch has 1. A step takes the batches of all processes."
    assert message in capsys.readouterr().err
    assert main([*command, "--workers", "2"]) == 2 and message in capsys.readouterr().err
    record.write_text(sealed({"processes": "2"}))
    assert main(command) == 2 and "'processes' is '2'" in capsys.readouterr().err
    record.unlink()
    assert main(command) == 0


@pytest.mark.slow
def test_processes_that_train_together_stop_at_the_same_step(tmp_path: Path) -> None:
    for name, stop_after in (("whole", 0), ("cut", 3)):
        run_two(HELPERS / "stopped_ranks.py", tmp_path / name, stop_after)
    steps = [path.name.split("-")[1] for path in checkpoint.checkpoints(tmp_path / "cut")]
    assert steps == ["4"]
    run_two(HELPERS / "stopped_ranks.py", tmp_path / "cut", 0)
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
