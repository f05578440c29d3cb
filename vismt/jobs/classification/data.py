"""The images of a multi-task configuration: each task's parts, opened once, under the labels of the union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vismt import console
from vismt.data.batching import Gathered
from vismt.data.images import ImageSet, open_images
from vismt.data.pixels import Pixels
from vismt.data.splits import divide, limited
from vismt.engine.splits import shares
from vismt.errors import UserError
from vismt.jobs.classification.config import MultitaskConfig, TaskConfig
from vismt.multitask.union import Union

Chosen = tuple[ImageSet, Tensor]  # images, their labels within the task


class TaskData:
    """union: the label space; classes: names, task by task. Parts are "train", "validation" and "test".

    A task's classes are those of its training sets, in the order in which their cards name them; `size` pixels. Raises
    UserError for a card that is not here, for a class without a training image, and for validation or test images of a
    class that training does not have.
    """

    def __init__(self, config: MultitaskConfig, size: int) -> None:
        self._config, self._size = config, size
        self._sets: dict[str, ImageSet] = {}
        self._parts: list[dict[str, list[Chosen]]] = []
        self._made: dict[tuple[int, str], Gathered] = {}
        self.classes: list[list[str]] = []
        for task in config.tasks:
            classes, parts = self._open_task(task)
            self.classes.append(classes)
            self._parts.append(parts)
            counts = "   ".join(f"{part} {sum(map(_count, found)):,}" for part, found in parts.items() if found)
            console.stage("data", f"{task.name}   {len(classes)} classes   {counts}")
        self.union = Union(tuple(task.name for task in config.tasks), tuple(len(names) for names in self.classes))

    @property
    def label_names(self) -> list[str]:
        """ "task/class" for every label of the union."""
        return [f"{task}/{name}" for task, own in zip(self.union.tasks, self.classes) for name in own]

    def training(self) -> Gathered:
        """All tasks' training images under the labels of the union."""
        return Gathered([part for task in range(len(self._parts)) for part in self._pixels(task, "train")])

    def check_part(self, task: int, part: str) -> None:
        """UserError where a task has no "validation" images."""
        if not self._parts[task][part]:
            name = self.union.tasks[task]
            raise UserError(
                f"tasks: {name}: nothing to validate on; name a set in validation, or give validation_share."
            )

    def part(self, task: int, part: str) -> Gathered:
        """The "validation" or "test" images of a task under the labels of the union."""
        self.check_part(task, part)
        if (task, part) not in self._made:
            self._made[task, part] = Gathered(self._pixels(task, part))
        return self._made[task, part]

    def _pixels(self, task: int, part: str) -> list[tuple[Pixels, Tensor]]:
        offset = self.union.offset(task)
        return [(Pixels(images, self._size), labels + offset) for images, labels in self._parts[task][part]]

    def _open_task(self, task: TaskConfig) -> tuple[list[str], dict[str, list[Chosen]]]:
        sets = [self._open(name) for name in task.train]
        for images in sets:
            twice = next((name for name in images.classes if images.classes.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"tasks: {task.name}: '{images.name}' calls two classes '{twice}'; name them apart.")
        classes = list(dict.fromkeys(name for images in sets for name in images.classes))
        kept = shares(task)
        parts: dict[str, list[Chosen]] = {"train": [], "validation": [], "test": []}
        for images in sets:
            for part, index in divide(images.labels, kept, images.name).items():
                parts[part].append(self._chosen(task, images.take(index) if kept else images, classes))
        for part in ("validation", "test"):
            parts[part] += [self._chosen(task, self._open(name), classes) for name in getattr(task, part)]
        if task.limit is not None:
            parts["train"] = _limit(parts["train"], task.limit)
        missing = set(range(len(classes))) - {label for _, labels in parts["train"] for label in labels.tolist()}
        if missing:
            raise UserError(f"tasks: {task.name}: no training image of class '{classes[min(missing)]}'; raise limit.")
        return classes, parts

    def _open(self, name: str) -> ImageSet:
        if name not in self._sets:
            card, _, split = name.partition(":")
            self._sets[name] = open_images(
                card, split or "all", on_bad_sample=self._config.on_bad_sample, download=self._config.download
            )
        return self._sets[name]

    def _chosen(self, task: TaskConfig, images: ImageSet, classes: Sequence[str]) -> Chosen:
        """Images with their labels within the task, by the names of the classes."""
        numbers = torch.tensor([classes.index(name) if name in classes else -1 for name in images.classes])
        labels = numbers[images.labels]
        if bool((labels < 0).any()):
            unknown = images.classes[int(images.labels[labels < 0][0])]
            raise UserError(
                f"tasks: {task.name}: '{images.name}:{images.split}' has class '{unknown}', training does not."
            )
        return images, labels


def _count(chosen: Chosen) -> int:
    return len(chosen[1])


def _limit(parts: Sequence[Chosen], limit: int) -> list[Chosen]:
    """Before anything is decoded: a limit of a thousand reads a thousand images."""
    labels = torch.cat([labels for _, labels in parts])
    kept = torch.zeros(len(labels), dtype=torch.bool)
    kept[limited(labels, [f"{images.name}:{name}" for images, _ in parts for name in images.ids], limit)] = True
    shares = [here.nonzero().flatten() for here in kept.split([_count(part) for part in parts])]
    return [(images.take(here), labels[here]) for (images, labels), here in zip(parts, shares) if len(here)]
