"""Trackers get the metrics of every training, beside metrics.jsonl.

TensorBoard, Weights & Biases and MLflow have names. Your own tracker is a subclass of `Tracker`. A study from Python takes an
object of it. An installed package registers it in a module, and names the module as an entry point of "vismt.trackers":

    @TRACKERS.register("mine")
    class Mine(Tracker):
        def log(self, step, values): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.objects import is_object, object_named, title_of
from vismt.base.registry import Registry, first_line, with_entry_points
from vismt.config.sections import flat

PROJECT = "vismt"


class Tracker(ABC):
    """Receiver of the metrics of one training after the other, in the first process of a launch.

    package: Name of the package that has to be installed, "" for none.
    """

    package: ClassVar[str] = ""
    changes_numbers: ClassVar[bool] = False  # the identity of a run leaves it out

    def start(self, training: str, folder: Path, settings: Mapping[str, object]) -> None:
        """Begin a training, or continue one.

        training: Name of run, arm, rate and seed. settings: Its configuration.
        """
        return

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step: loss, other outputs of the objective, lr, grad_norm and elapsed_s."""

    def finish(self) -> None:
        """End the training, whether it is finished or was interrupted."""
        return


class _Known(Registry[Callable[[], Tracker]]):
    """Trackers by name, and the objects of a study from Python."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and is_object(name))

    def __getitem__(self, name: str) -> Callable[[], Tracker]:
        return (lambda: object_named(name)) if is_object(name) else super().__getitem__(name)


TRACKERS = _Known(
    "train.trackers: no tracker",
    with_entry_points("vismt.trackers", dict.fromkeys(("mlflow", "tensorboard", "wandb"), __name__)),
)


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Event files in the folder of the training."""

    package = "tensorboard"

    def start(self, training: str, folder: Path, settings: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


@TRACKERS.register("wandb")
class WeightsAndBiases(Tracker):
    """A run of the project "vismt". WANDB_MODE=offline works without a network."""

    package = "wandb"

    def start(self, training: str, folder: Path, settings: Mapping[str, object]) -> None:
        import wandb

        self.run = wandb.init(project=PROJECT, name=training, dir=str(folder), config=dict(settings), reinit=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


@TRACKERS.register("mlflow")
class Mlflow(Tracker):
    """A run of the experiment "vismt", at the place that MLFLOW_TRACKING_URI names."""

    package = "mlflow"

    def start(self, training: str, folder: Path, settings: Mapping[str, object]) -> None:
        import mlflow

        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=training)
        mlflow.log_params(flat(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        import mlflow

        mlflow.end_run()


def check_trackers(names: Collection[str]) -> None:
    """Raise UserError for a tracker whose package is absent, and for an object of another class than Tracker."""
    packages = [getattr(TRACKERS[name], "package", "") for name in names]
    absent = ", ".join(package for package in packages if package and find_spec(package) is None)
    if absent:
        raise UserError(f'train.trackers: not installed: {absent}; pip install "vismt[log]".')
    for name in filter(is_object, names):
        if not isinstance(object_named(name), Tracker):
            raise UserError(
                f"train.trackers: '{title_of(name)}' does not derive from vismt.engine.trackers.Tracker; derive its class."
            )


class Trackers:
    """The trackers of one training. A tracker that fails is named and left out, and the training goes on.

    Raises:
        UserError: If a tracker cannot start.
    """

    def __init__(self, names: Iterable[str], training: str, folder: Path, settings: Mapping[str, object]) -> None:
        self._running: list[tuple[str, Tracker]] = []
        for name in names:
            tracker = TRACKERS[name]()
            try:
                tracker.start(training, folder, settings)
            except Exception as error:
                self.close()
                raise UserError(f"train.trackers: {title_of(name)} cannot start ({first_line(error)}).") from error
            self._running.append((title_of(name), tracker))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._running]:
            try:
                call(tracker)
            except Exception as error:
                self._running.remove((name, tracker))
                console.stage("track", f"{name} failed and is left out ({first_line(error)})")
