"""Trackers of accelerate: which are known, and what they get of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from helpers.tiny_runs import refused, write_config
from helpers.toy_training import Toy, batches, logged

from vismt.cli import main
from vismt.config.sections import TrainConfig
from vismt.engine import loop
from vismt.jobs import training_job


class Listed(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, tracker = "listed", False, None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.calls.append({"step": step, **values})

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("stop_after", [None, 3])
def test_a_tracker_gets_every_logged_step_and_ends_also_if_the_training_is_interrupted(
    tmp_path: Path, stop_after: int | None
) -> None:
    def after(_: object, step: int) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    tracker, config = Listed(), TrainConfig(steps=4, log_every=2, trackers=["wandb"])
    arguments = (Toy(), batches, config, tmp_path, "hash", Accelerator(log_with=[tracker]))
    try:
        loop.train(*arguments, seed=1, after_step=after, sections=config, name="toy")
    except KeyboardInterrupt:
        assert stop_after
    start, settings, *rows, end = tracker.calls
    assert (start, end) == ("start", "finish")
    assert settings["steps"] == 4 and settings["trackers"] == "['wandb']"
    assert [row["step"] for row in rows] == ([2] if stop_after else [2, 4])
    times = ("elapsed_s", "memory_mb")
    assert [{key: row[key] for key in row if key not in times} for row in rows] == logged(tmp_path)


def test_absent_packages_are_named_before_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_job, "find_spec", lambda package: None)
    monkeypatch.setattr(loop, "train", None)
    monkeypatch.setattr("vismt.jobs.multitask.classifier_job.ClassifierJob.check_data", None)
    command = ["run", write_config("multitask", tmp_path), "--out", tmp_path / "runs"]
    error = refused(capsys, *command, "train.trackers=[wandb,tensorboard]")
    assert 'train.trackers: not installed: wandb, tensorboard; pip install "vismt[log]".' in error
    assert not (tmp_path / "runs").exists()
    error = refused(capsys, *command, "train.trackers=[wandbb]")
    assert "'wandbb' is not known. Near: 'wandb'" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_the_libraries_themselves_take_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    command = ["run", str(write_config("multitask", tmp_path)), "--out", str(tmp_path / "runs"), "--quiet"]
    assert main([*command, f"train.trackers=[{name}]"]) == 0
    (folder,) = (tmp_path / "runs").glob("*/arms/*/lr-*")
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "vismt"))
        events.Reload()
        assert [point.step for point in events.Scalars("loss")] == [1, 2, 3]
    elif name == "wandb":
        assert [*folder.glob("wandb/offline-run-*/*.wandb")]
    else:
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["vismt"], output_format="list")
        assert [point.step for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
