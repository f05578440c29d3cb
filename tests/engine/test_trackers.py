"""Trackers: which are known, what each gets of a training, and what becomes of one that is absent or fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_runs import CONFIGS, refused, write_config
from helpers.toy_training import Toy, batches, logged, train

import vismt
from vismt.base.errors import UserError
from vismt.base.objects import registered
from vismt.cli import main
from vismt.config.sections import TrainConfig
from vismt.engine import loop, trackers
from vismt.engine.trackers import Tracker, Trackers


class Listed(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, training: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self.calls.append(("start", training, folder, settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append((step, dict(values)))

    def finish(self) -> None:
        self.calls.append("finish")


def test_an_object_gets_every_logged_step_of_every_training_and_the_run_stays_the_same(tmp_path: Path) -> None:
    config = {**CONFIGS["multitask"], "arms": {"few": {"train.steps": 2}, "more": {}}}
    own = [Listed(), Listed()]
    results = vismt.train({**config, "train": {**config["train"], "trackers": own}}, tmp_path / "run")
    assert own[0].calls == own[1].calls
    calls = iter(own[0].calls)
    for arm, steps in (("few", 2), ("more", 3)):
        folder = tmp_path / "run" / "arms" / arm / "lr-0.01-seed-0"
        begun, *rows = [next(calls) for _ in range(steps + 1)]
        assert begun[:3] == ("start", f"run {arm} lr 0.01 seed 0", folder) and begun[3]["train"]["steps"] == steps
        assert [{"step": step, **values} for step, values in rows] == [
            row | {key: values[key] for key in ("elapsed_s", "memory_mb") if key in values}
            for row, (_, values) in zip(logged(folder), rows)
        ]
        assert next(calls) == "finish"
    assert not list(calls)
    # Without trackers, or with other ones, it is the same run, whose trainings are finished.
    again = vismt.train(config, tmp_path / "run")
    assert again.rows == results.rows
    vismt.train({**config, "train": {**config["train"], "trackers": [Listed()]}}, tmp_path / "run")


class Failing(Listed):
    """Fails in the method that is named."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def start(self, training: str, folder: Path, settings: Mapping[str, Any]) -> None:
        super().start(training, folder, settings)
        self.fail("start")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        self.fail("log" if step == 2 else "")

    def finish(self) -> None:
        super().finish()
        self.fail("finish")

    def fail(self, method: str) -> None:
        if method == self.method:
            raise ConnectionError("no network\nmore")


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_is_named_and_the_training_and_the_other_tracker_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    objects = {"<Failing 00000000>": Failing(method), "<Listed 00000001>": Listed()}
    with registered(objects):
        running = Trackers(objects, "toy", tmp_path, {})
        for step in (1, 2, 3):
            running.log(step, {"loss": 1.0})
        running.close()
    failing, other = (tracker.calls for tracker in objects.values())
    steps = [(step, {"loss": 1.0}) for step in (1, 2, 3)]
    assert other[1:] == [*steps, "finish"] and failing[1:] == (steps[:2] if method == "log" else other[1:])
    line = "track   Failing failed and is left out (ConnectionError: no network)\n"
    assert capsys.readouterr().out == line


def test_a_tracker_that_cannot_start_is_an_error_that_ends_those_that_have_started(tmp_path: Path) -> None:
    objects = {"<Listed 00000000>": Listed(), "<Failing 00000001>": Failing("start")}
    with registered(objects), pytest.raises(UserError, match="Failing cannot start \\(ConnectionError: no network\\)"):
        Trackers(objects, "toy", tmp_path, {})
    assert objects["<Listed 00000000>"].calls[1:] == ["finish"]


def test_trackers_of_an_interrupted_training_end(tmp_path: Path) -> None:
    own = Listed()
    name = "<Listed 00000000>"
    with registered({name: own}), pytest.raises(KeyboardInterrupt):
        train(Toy(), batches, tmp_path, 2, sections=TrainConfig(), steps=4, trackers=[name], log_every=2)
    assert own.calls[1:] == ["finish"]  # before the second step was logged


def test_an_absent_package_and_a_wrong_object_are_named_before_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    monkeypatch.setattr(loop, "train", None)
    monkeypatch.setattr("vismt.jobs.multitask.classifier_job.ClassifierJob.check_data", None)
    command = ["run", write_config("multitask", tmp_path), "--out", tmp_path / "runs"]
    error = refused(capsys, *command, "train.trackers=[wandb,tensorboard]")
    assert 'train.trackers: not installed: wandb, tensorboard; pip install "vismt[log]".' in error
    assert not (tmp_path / "runs").exists()
    error = refused(capsys, *command, "train.trackers=[wandbb]")
    assert "'wandbb' is not known. Near: 'wandb'" in error
    config = {**CONFIGS["multitask"], "train": {"trackers": [SimpleNamespace(log=print)]}}
    with pytest.raises(
        UserError, match=r"'SimpleNamespace' does not derive from vismt\.engine\.trackers\.Tracker; derive its class"
    ):
        vismt.train(config, tmp_path / "run")


class Recorder(ModuleType):
    """A module every function of which notes its calls and returns the module."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: self._calls.append((name, arguments, options)) or self


def calls_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str) -> list[Any]:
    """Return the calls of a training's tracker to a module that stands for its library."""
    calls: list[Any] = []
    for part in {name, module}:
        monkeypatch.setitem(sys.modules, part, Recorder(part, calls))
    trackers.check_trackers([name])
    running = Trackers([name], "run lora", tmp_path, {"train": {"steps": 2}, "arms": {}})
    running.log(1, {"loss": 0.5, "lr": 0.1})
    running.close()
    return calls


def test_the_calls_of_each_known_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the documentation of the libraries has them; none of them has to be installed here."""
    assert calls_of(monkeypatch, tmp_path, "tensorboard", "torch.utils.tensorboard") == [
        ("SummaryWriter", (str(tmp_path / "tensorboard"),), {}),
        ("add_scalar", ("loss", 0.5, 1), {}),
        ("add_scalar", ("lr", 0.1, 1), {}),
        ("close", (), {}),
    ]
    begun, *rest = calls_of(monkeypatch, tmp_path, "wandb", "wandb")
    assert begun[2]["name"] == "run lora" and begun[2]["config"] == {"train": {"steps": 2}, "arms": {}}
    assert begun[2]["dir"] == str(tmp_path)
    assert rest == [("log", ({"loss": 0.5, "lr": 0.1},), {"step": 1}), ("finish", (), {})]
    assert calls_of(monkeypatch, tmp_path, "mlflow", "mlflow") == [
        ("set_experiment", ("vismt",), {}),
        ("start_run", (), {"run_name": "run lora"}),
        ("log_params", ({"train.steps": 2, "arms": {}},), {}),
        ("log_metrics", ({"loss": 0.5, "lr": 0.1},), {"step": 1}),
        ("end_run", (), {}),
    ]


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

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [point.step for point in events.Scalars("loss")] == [1, 2, 3]
    elif name == "wandb":
        assert [*folder.glob("wandb/offline-run-*/*.wandb")]
    else:
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["vismt"], output_format="list")
        assert [point.step for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
