"""A job whose own test images can be attacked and corrupted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic

from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.engine.training_files import ADAPTER, has_adapter
from vismt.evaluation.sections import divides, fitted_keys
from vismt.jobs.evaluation_job import records_folder
from vismt.jobs.training_job import Config, Net, TrainingJob
from vismt.multitask.emtal.router_maps import has_routers, router_maps
from vismt.multitask.objectives import MultitaskObjective
from vismt.report.panels import to_bytes, write_arrays
from vismt.report.results import RECORDS
from vismt.report.routers import ROUTERS
from vismt.robustness.conditions import AttackConfig
from vismt.uncertainty.features import Inputs

MAPPED_IMAGES = 4  # with a picture of their routers


class ImageJob(TrainingJob[Config, Net], Generic[Config, Net]):
    """A job whose trained nets the robustness job can evaluate on the job's own images.

    It also writes the files from which the report draws routers.
    """

    def check_features(self, evaluate: object) -> None:
        """Raise UserError for features of a section `evaluate` of another run that cannot be fitted on this run's examples."""
        apart, tune = fitted_keys(evaluate, apart=True), self.config.tune
        if apart and divides(evaluate, tune) and not divides(getattr(self.config, "evaluate", None), tune):
            raise UserError(
                f"evaluate.{apart[0]}: the run '{self.folder}' chose its rates on all of its validation images, so none are left "
                f"for the thresholds; add evaluate.{apart[0]} to that run and train it again."
            )

    @abstractmethod
    def inputs(self, seed: int = 0) -> Inputs:
        """Return what attacks and corruptions meet. seed: Seed of attacks."""

    @property
    @abstractmethod
    def evaluation(self) -> Any:
        """An object that scores trained nets on the run's own images.

        It has the method `scores(net, training, split, records, inputs, features)`.

        `scores` returns every measure, clean and under each attack and corruption. net: Function that returns the evaluated net,
        called if something is not on record. records: Folder of records. features: Features of an evaluation. inputs: What
        attacks and corruptions meet.
        """

    def records(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> Path:
        """Return the folder of a training's records. Validation examples that are also evaluated choose a rate in another."""
        chooses = attacks == [] and split == self.split
        return records_folder(training.folder / RECORDS, attacks) / ("tune" if chooses else "")

    def outputs(self, merged: Net, plain: Net) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        return self.evaluation.outputs(merged, plain)

    def step(self, objective: nn.Module, number: int) -> None:
        if isinstance(objective, MultitaskObjective):
            objective.step()

    def write_router_maps(self, net: Callable[[Training], nn.Module], images: Callable[[], Tensor]) -> None:
        """Write the router maps of every arm whose net has routers. net: Net of a training, not merged. images: Images to map."""
        for arm in self.study.arms:
            training = self.study.trainings(arm)[0]
            if not has_adapter(training) or not has_routers(training.folder / ADAPTER):
                continue
            trained = net(training)
            if isinstance(trained.backbone, Backbone):  # one grid of patches
                shown = images()
                arrays = {"images": to_bytes(shown), **router_maps(trained, shown)}
                write_arrays(self.folder / ROUTERS / f"{arm}.npz", arrays)
