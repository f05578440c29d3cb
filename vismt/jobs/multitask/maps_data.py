"""The samples of a dense configuration: its parts, opened once, fitted into one size, and batches of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.identity import Identity
from vismt.base.seeds import digest, mix_seed
from vismt.data.batching import Passes
from vismt.data.image_set import named_groups
from vismt.data.maps import dense_transforms as transforms
from vismt.data.maps.dense_sample import CLASS, Sample, collate
from vismt.data.maps.dense_set import DenseSet
from vismt.jobs.multitask.config import (
    MultitaskConfig,
    all_tasks,
    canvas_of,
    image_tasks,
    own_parts,
    trained_tasks,
)
from vismt.jobs.sets import Sets, divided
from vismt.multitask.class_loss import ClassLoss, check_counts
from vismt.multitask.nets import SEGMENTATION
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import Segmentation
from vismt.multitask.tasks.maps import Depth, InverseDepth
from vismt.report.panels import spread

SAMPLED = 256  # samples that the mean depth and the constant predictions are of
_PIXELS = 4096  # of each of them that a constant prediction is of


@dataclass(frozen=True)
class Rows:
    """Samples of several sets behind one running index, in the order of their sets and in their own sizes."""

    entries: list[tuple[DenseSet, int]]
    _digests: dict[int, str] = field(default_factory=dict)  # of the samples that were read

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def _images(self) -> list[str]:
        """The names of the samples' images, "set:id"."""
        return [f"{images.name}:{images.ids[i]}" for images, i in self.entries]

    @property
    def ids(self) -> list[str]:
        """The samples' names, "set:id". An image that several tasks name has a sample for each, with the task after its name."""
        names = self._images
        counts = Counter(names)
        tasks = (images.targets[0].partition(":")[2] for images, _ in self.entries)
        return [f"{name} {task}" if counts[name] > 1 else name for name, task in zip(names, tasks)]

    def groups(self, index: Tensor | None = None) -> tuple[dict[str, str], str]:
        """Return the group of each sample by its name, as `named_groups` does. index: Indices of the samples, None for all."""
        rows = range(len(self)) if index is None else index.tolist()
        ids, images = self.ids, self._images
        return named_groups([ids[i] for i in rows], [self.entries[i] for i in rows], [images[i] for i in rows])

    @property
    def name(self) -> str:
        """The sets' names, joined by +."""
        return "+".join(dict.fromkeys(images.name for images, _ in self.entries))

    def content(self, number: int) -> str:
        """Return a digest of a sample in its own size. The sample is read if it was not read yet."""
        if number not in self._digests:
            images, i = self.entries[number]
            self._note(number, images.stored(i))
        return self._digests[number]

    @cached_property
    def files(self) -> str:
        """A digest of the files from which the samples are read, "" if they are not known."""
        contents = dict.fromkeys(images.content(i) for images, i in self.entries)
        return digest(" ".join(contents).encode()) if all(contents) else ""

    def _note(self, number: int, sample: Sample) -> None:
        if number not in self._digests:
            self._digests[number] = str(Identity(sample))

    def fitted(self, number: int, size: tuple[int, int]) -> Sample:
        """Return a sample fitted into `size` and padded, so that training and evaluation see the same camera."""
        return transforms.pad(self.unpadded(number, size), size)

    def unpadded(self, number: int, size: tuple[int, int]) -> Sample:
        """Return a fitted sample before padding, because padding must not enter a score."""
        images, i = self.entries[number]

        def fitted(sample: Sample) -> Sample:
            self._note(number, sample)
            return transforms.fit_sample(sample, size)

        return images.read(i, fitted)


class DenseData:
    """The parts "train", "validation" and "test" of a configuration's sets, fitted into a canvas of `size` (h, w).

    tasks: Tasks by name, with depth or inverse depth as in the sets. Raises UserError for a missing card, a set without a
    target of any task, a task without a target in the sets of a part, a number of classes that differs from the sets, classes
    with different names in two sets, and depth beside inverse depth.
    """

    def __init__(self, config: MultitaskConfig) -> None:
        tasks = all_tasks(config)
        self.size = canvas_of(config)
        self._sets = Sets(config.on_bad_sample, config.download)
        self._counts: dict[str, list[int]] = {}
        self.parts: dict[str, Rows] = {part: Rows([]) for part in ("train", "validation", "test")}
        for parts, key in [
            (config.data, CLASS),
            *((own, f"{CLASS}:{name}") for name, own in own_parts(config).items()),
        ]:
            for part, chosen in divided(parts, partial(_samples, self._sets, key)).items():
                self.parts[part].entries.extend((images, i) for images, index in chosen for i in index.tolist())
        sets = list({id(images): images for rows in self.parts.values() for images, _ in rows.entries}.values())
        for images in sets:
            _check_set(images, tasks)
        for key in (task.key for task in image_tasks(tasks)):
            _check_names([(images.name, images.image_classes) for images in sets if key in images.targets])
        if SEGMENTATION in [task.key for task in tasks]:
            labelled = [(images.name, images.classes) for images in sets if SEGMENTATION in images.targets]
            named = [(name, classes) for name, classes in labelled if not _numbered(classes)]
            _check_names(named)
            tasks = [_with_names(task, named[0][1]) for task in tasks] if named else tasks
        self.tasks = {task.name: task for task in tasks}
        depth = self.tasks.get(Depth.name)
        if isinstance(depth, Depth) and _inverse(sets):
            self.tasks[Depth.name] = InverseDepth.of(depth)
        for part in ("train", "validation", "test"):
            self._check_targets(part, tasks)
        console.stage("data", "   ".join(f"{part} {len(rows):,}" for part, rows in self.parts.items() if len(rows)))

    def part(self, name: str) -> Rows:
        """Return the samples of a part. Raise UserError if the validation part is missing."""
        if not len(self.parts[name]):
            raise UserError("data: nothing to validate on; name a set in validation, or give validation_share.")
        return self.parts[name]

    def rows(self, *entries: str) -> Rows:
        """Return the samples of sets that do not belong to the run."""
        sets = [self._sets.samples(entry, grouped=True) for entry in entries]
        return Rows([(images, i) for images in sets for i in range(len(images))])

    def outside(self, name: str) -> FittedImages:
        """Return the images of a set that does not belong to the run."""
        return FittedImages(self.rows(name), self.size)

    def classes(self, part: str, task: Task) -> Tensor:
        """Return the classes (n,) of the images of a part that have one of a task of whole images."""
        entries = self._labelled(part, task).entries
        classes = [int(labels[i]) for images, i in entries if (labels := images.labels) is not None]
        return torch.tensor(classes, dtype=torch.int64)

    def class_groups(self, part: str, task: Task) -> list[str]:
        """Return the group of each of these images, [] for independent images."""
        return list(self._labelled(part, task).groups()[0].values())

    def whole_images(self, part: str, task: Task) -> FittedImages:
        """Return these images."""
        return FittedImages(self._labelled(part, task), self.size)

    def _labelled(self, part: str, task: Task) -> Rows:
        entries = self.part(part).entries
        return Rows([(images, i) for images, i in entries if task.key in images.targets and images.labels is not None])

    def counted(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks, with counted training labels if the loss needs them."""
        return [
            replace(cast(Any, task), class_counts=self.class_counts(task))
            if isinstance(task, ClassLoss) and task.needs_counts
            else task
            for task in tasks
        ]

    def class_counts(self, task: Task) -> list[int]:
        """Return the training labels of each class of a task, in the images' own sizes.

        Raises UserError for a class without one.
        """
        if task.key not in self._counts:
            counts = torch.zeros(task.channels, dtype=torch.int64)
            entries = [entry for entry in self.parts["train"].entries if task.key in entry[0].targets]
            for images, i in console.track(entries, "data", f"{task.name}: training labels by class"):
                sample = images.read(i)
                if task.key in sample:
                    labels = sample[task.key][None]
                    counts += labels[task.valid(labels)].bincount(minlength=task.channels)
            self._counts[task.key] = counts.tolist()
        check_counts(f"tasks: {task.name}", self._counts[task.key], task.channels)
        return self._counts[task.key]

    @cached_property
    def mean_depth(self) -> float:
        """The mean depth of the valid pixels of training samples, of at most SAMPLED evenly over their order."""
        task = self.tasks[Depth.name]
        entries = [entry for entry in self.parts["train"].entries if task.key in entry[0].targets]
        maps = [entries[i][0].read(entries[i][1]).get(task.key) for i in spread(len(entries), SAMPLED).tolist()]
        values = [map[task.valid(map[None])[0]].double() for map in maps if map is not None]
        return float(torch.cat(values).mean()) if any(map(len, values)) else 0.0

    def constants(self, tasks: Iterable[Task]) -> dict[str, Tensor]:
        """Return the best constant prediction (channels,) of each task with values in training samples, as they are scored.

        It comes from at most SAMPLED samples of a task, evenly over their order, and _PIXELS pixels of each of them.
        """
        rows, values = self.parts["train"], {task.name: list[Tensor]() for task in tasks}
        by_number: dict[int, list[Task]] = {}
        for task in tasks:
            labelled = [i for i, (images, _) in enumerate(rows.entries) if task.key in images.targets]
            for place in spread(len(labelled), SAMPLED).tolist():
                by_number.setdefault(labelled[place], []).append(task)
        for number in console.track(sorted(by_number), "data", "constant predictions"):
            sample = rows.unpadded(number, self.size)
            for task in (task for task in by_number[number] if task.key in sample):
                target = sample[task.key][None]
                found = (target.movedim(1, -1) if task.vector else target)[task.valid(target)]
                values[task.name].append(found[:: max(1, len(found) // _PIXELS)])
        joined = {task: torch.cat(parts) for task, parts in values.items() if parts}
        return {task.name: task.constant(joined[task.name]) for task in tasks if len(joined.get(task.name, ()))}

    def _check_targets(self, part: str, tasks: Sequence[Task]) -> None:
        entries = self.parts[part].entries
        known = {target for images, _ in entries for target in images.targets}
        lacking = next((task for task in tasks if entries and task.key not in known), None)
        if lacking is not None:
            what = "maps of it" if isinstance(lacking, MapTask) else "classes of its images"
            raise UserError(
                f"tasks: {lacking.name}: no {part} set has {what}; {self.parts[part].name} has {', '.join(sorted(known))}."
            )


class FittedImages:
    """The images of some samples, fitted and padded, with `images[index]` as in `vismt.data.batching.Gathered`."""

    def __init__(self, rows: Rows, size: tuple[int, int]) -> None:
        self.rows, self.size, self.ids, self.groups = rows, size, rows.ids, rows.groups
        self.labels = torch.zeros(len(rows), dtype=torch.int64)

    @property
    def content(self) -> str:
        return self.rows.files

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self.rows.fitted(i, self.size)["image"] for i in index.tolist()])


class DenseBatches:
    """Batches by number, a function of (seed, k): passes over the rows of trained tasks, each in its own random order.

    canvas: Size (h, w) into which an image is fitted. config: Configuration of an arm, which gives crops and targets. Raises
    UserError if there are fewer rows than images in a batch.
    """

    def __init__(self, rows: Rows, canvas: tuple[int, int], config: MultitaskConfig) -> None:
        self.canvas, self.config = canvas, config
        self.kept = ("image", *(task.key for task in trained_tasks(config)))
        self.rows = Rows([entry for entry in rows.entries if {*self.kept} & {*entry[0].targets}])
        self._passes = Passes(len(self.rows), config.batch, seed=config.seed)

    def __call__(self, number: int) -> Sample:
        rows = self._passes(number).tolist()
        return collate(
            [self._sample(row, mix_seed(self.config.seed, "augment", number, place)) for place, row in enumerate(rows)]
        )

    def _sample(self, row: int, seed: int) -> Sample:
        size, (images, i) = (self.config.size[0], self.config.size[1]), self.rows.entries[row]

        def augmented(sample: Sample) -> Sample:
            fitted = transforms.resize(sample, self.canvas)
            return transforms.augment_sample(
                fitted, seed, size, self.config.augment, inverse_depth=images.inverse_depth
            )

        # Labels decide which crop is taken, so what an arm does not train is dropped only afterwards: arms see the same crops.
        return {name: values for name, values in images.read(i, augmented).items() if name in self.kept}


def _samples(sets: Sets, key: str, entry: str, grouped: bool) -> DenseSet:
    images = sets.samples(entry, grouped, key)
    if key != CLASS and images.labels is None:
        raise UserError(f"tasks: {key.partition(':')[2]}: '{images.name}' has maps; name it in data.")
    return images


def _check_set(images: DenseSet, tasks: Sequence[Task]) -> None:
    if not any(task.key in images.targets for task in tasks):
        targets, names = ", ".join(images.targets), ", ".join(task.name for task in tasks)
        raise UserError(
            f"data: '{images.name}' has {targets}, which none of the tasks ({names}) learns from; leave it out."
        )
    for task in tasks:
        classes = {task.key: images.image_classes, "semseg": images.classes, "parts": images.parts}.get(task.key)
        if classes and task.key in images.targets and task.channels != len(classes):
            raise UserError(f"tasks: {task.name}: classes {task.channels}, '{images.name}' has {len(classes)}.")


def _check_names(named: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise UserError if one number stands for two classes. named: Pairs (set, its classes)."""
    for name, classes in named[1:]:
        first, first_classes = named[0]
        for expected, actual in zip(first_classes, classes):
            if expected != actual:
                raise UserError(
                    f"data: one class is '{expected}' in '{first}' and '{actual}' in '{name}'; give both the same names."
                )


def _with_names(task: Task, names: Sequence[str]) -> Task:
    """Return a task of segmentation with names of its classes, unless it has names. Return other tasks unchanged."""
    if task.name != SEGMENTATION or not isinstance(task, Segmentation) or task.class_names is not None:
        return task
    return replace(task, class_names=list(names))


def _numbered(classes: Sequence[str]) -> bool:
    """Return whether the classes of maps are named by their numbers, because the card does not name them."""
    return list(classes) == [str(number) for number in range(len(classes))]


def _inverse(sets: Sequence[DenseSet]) -> bool:
    inverse = [images for images in sets if Depth.key in images.targets and images.inverse_depth]
    metric = [images for images in sets if Depth.key in images.targets and not images.inverse_depth]
    if inverse and metric:
        raise UserError(
            f"data: '{inverse[0].name}' has inverse depth, '{metric[0].name}' depth; take sets of one kind, or no task depth."
        )
    return bool(inverse)
