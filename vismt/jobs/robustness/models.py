"""One interface for classifiers from timm, checkpoints, RobustBench, run folders and functions.

A run folder without cards (TrainedArm) is evaluated by its own job on its own images: several tasks, maps, their own scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from torch import nn

from vismt.base.errors import UserError
from vismt.base.identity import Identity, weights_digest
from vismt.base.objects import object_named
from vismt.engine import runtime
from vismt.jobs import open_run
from vismt.jobs.image_job import ImageJob
from vismt.jobs.robustness.config import ClassifierConfig
from vismt.jobs.training_job import TrainingJob
from vismt.robustness.classifier import (
    ROBUSTBENCH,
    checkpoint_config,
    checkpoint_file,
    classifier_from_function,
    classifier_of,
    load_classifier,
    load_robustbench,
)


@dataclass(frozen=True)
class Classifier:
    """A classifier of images in [0, 1].

    net: Module from images (b, 3, h, w) to logits (b, k), in eval mode. size: Size of the decoded images in pixels. labels:
    Names of the k outputs, "task/class" of a multi-task run. None if only their number is known. cards: Cards of each task, by
    the name in rows of results. task: Task whose outputs are meant. None lets the card decide. separate: Whether each task has
    its own softmax.
    """

    net: nn.Module
    num_classes: int
    size: int
    labels: list[str] | None = None
    cards: Mapping[str, Collection[str]] = field(default_factory=dict)
    task: str | None = None
    separate: bool = False

    def fingerprint(self) -> str:
        """Return a digest of the weights, and of the code of a net with its own code, which may change."""
        identity = Identity(self.net)
        return str(identity) if identity.foreign and not identity.unknown else weights_digest(self.net)


def check_exists(config: ClassifierConfig) -> None:
    """Raise UserError for a file or a run folder that does not exist."""
    if config.run is not None:
        open_run(Path(config.run))
    name = config.name or ""
    if name and object_named(name) is None and not name.startswith(ROBUSTBENCH):
        checkpoint_file(name)


def make_classifier(config: ClassifierConfig) -> Classifier:
    """Return the classifier of a configuration on the device of this process."""
    return replace(_load(config), task=config.task)


def _load(config: ClassifierConfig) -> Classifier:
    device = runtime.processes().device
    given = object_named(config.name or "")
    if given is not None:
        own = classifier_of(given, config.img_size)
        return Classifier(own.to(device), own.num_classes, config.size or max(own.size), own.labels)
    if config.run is not None:
        job = open_run(Path(config.run)).job
        net, labels, size = job.classifier(config.arm)
        separate = job.about(config.arm).get("label_space") == "separate"
        net, size = net.eval().to(device), config.size or size
        return Classifier(net, len(labels), size, labels, job.cards_of_tasks(), separate=separate)
    if config.function is not None:
        net, classes = classifier_from_function(config.function, config.size)
        return Classifier(net.to(device), classes, config.size or 0)
    if config.name is not None and config.name.startswith(ROBUSTBENCH):
        net, classes, size = load_robustbench(config.name)
        return Classifier(net.to(device), classes, config.size or size)
    timm = load_classifier(
        config.name or "",
        architecture=config.architecture,
        pretrained=config.pretrained,
        img_size=config.img_size,
        mean=config.mean,
        std=config.std,
    )
    path = checkpoint_file(config.name or "")
    separate = path is not None and checkpoint_config(path).get("label_space") == "separate"
    size = config.size or max(timm.size)
    return Classifier(timm.to(device), timm.num_classes, size, timm.labels, separate=separate)


class TrainedArm:
    """One training of a run folder.

    Raises UserError for a run that trains nothing, and for an unknown arm.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        run = open_run(Path(config.run or ""))
        if not isinstance(run.job, TrainingJob):
            raise UserError(f"classifier.run: '{config.run}' trains nothing; name a run of multitask or dense.")
        if not isinstance(run.job, ImageJob):
            raise UserError(
                f"classifier.run: '{config.run}': the job '{run.config.task}' has no images of its own to attack or corrupt; "
                "name a run of multitask or dense."
            )
        self.job = run.job
        self.training = run.job.study.find(config.arm)
        self.net = cache(lambda: self.job.final(self.training))  # kept like the classifiers of cards
