"""The images of a multi-task configuration: the parts of each task, opened once, with the labels of the union."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.batching import Gathered
from vismt.data.images import ImageSet
from vismt.data.pixels import Pixels
from vismt.data.set_entries import overlap
from vismt.engine.parts import PartsConfig
from vismt.jobs.multitask.config import MultitaskConfig, entry_name, own_parts
from vismt.jobs.sets import Sets, divided
from vismt.multitask.nets import Union
from vismt.storage.files import JsonObject

Chosen = tuple[ImageSet, Tensor]  # images, their labels within the task


class TaskData:
    """The parts "train", "validation" and "test" of every task, of images of `size` x `size` pixels.

    The classes of a task are the classes of its training sets, in the order of their cards. kept: What a run folder has of
    `needed`, so that the label space is known without the images. They are opened on first use.

    Raises UserError for a card that is not available, a class without a training image, validation or test images of a class
    that training does not have, and other classes than are kept.
    """

    def __init__(self, config: MultitaskConfig, size: int, kept: JsonObject | None = None) -> None:
        self.size = size
        self._sets = Sets(config.on_bad_sample, config.download)
        self._gathered: dict[tuple[int, str], Gathered] = {}
        self._named = own_parts(config)
        self._given = {entry_name(spec): spec.get("classes") for spec in config.tasks if not isinstance(spec, str)}
        self._kept = kept

    @cached_property
    def _opened(self) -> list[tuple[list[str], dict[str, list[Chosen]]]]:
        """The classes and the parts of each task."""
        opened = []
        for number, (task, named) in enumerate(self._named.items()):
            classes, parts = self._open_task(task, named)
            expected = self._given[task] if self._kept is None else len(self._kept["classes"][number])
            if expected not in (None, len(classes)):
                raise UserError(f"tasks: {task}: classes {expected}, '{', '.join(named.train)}' has {len(classes)}.")
            opened.append((classes, parts))
            counts = "   ".join(
                f"{part} {sum(len(y) for _, y in chosen):,}" for part, chosen in parts.items() if chosen
            )
            console.stage("data", f"{task}   {len(classes)} classes   {counts}")
        return opened

    @property
    def _parts(self) -> list[dict[str, list[Chosen]]]:
        return [parts for _, parts in self._opened]

    @cached_property
    def needed(self) -> JsonObject:
        """The classes of each task, and the number of training images of each class of the union."""
        if self._kept is not None:
            return self._kept
        classes, counts = [names for names, _ in self._opened], list[int]()
        for names, parts in self._opened:
            labels = torch.cat([y for _, y in parts["train"]])
            counts += labels.bincount(minlength=len(names)).tolist()
        return {"classes": classes, "counts": counts}

    @property
    def classes(self) -> list[list[str]]:
        """The names of the classes, task by task."""
        return self.needed["classes"]

    @cached_property
    def union(self) -> Union:
        """The label space."""
        return Union(tuple(self._named), tuple(len(names) for names in self.classes))

    @property
    def label_names(self) -> list[str]:
        """The name of every label of the union: the name of the class for a single task, else "task/class"."""
        if len(self.classes) == 1:
            return self.classes[0]
        return [f"{task}/{name}" for task, names in zip(self.union.tasks, self.classes) for name in names]

    def training(self, tasks: Sequence[str] = ()) -> Gathered:
        """Return the training images of the named tasks, by default of all, with the labels of the union."""
        return Gathered([part for task in self._numbers(tasks) for part in self._pixels(task, "train")])

    def class_counts(self, tasks: Sequence[str] = ()) -> list[int]:
        """Return the number of training images of each class of the union, of the named tasks, by default of all."""
        numbers, counts = self._numbers(tasks), self.needed["counts"]
        return [n if of in numbers else 0 for n, of in zip(counts, self.union.task_of_class().tolist())]

    def has_part(self, task: int, part: str) -> bool:
        return bool(self._parts[task][part])

    def check_part(self, task: int, part: str) -> None:
        if not self.has_part(task, part):
            name = self.union.tasks[task]
            raise UserError(
                f"tasks: {name}: nothing to validate on; name a set in validation, or give validation_share."
            )

    def part(self, task: int, part: str) -> Gathered:
        """Return the "validation" or "test" images of a task with the labels of the union."""
        self.check_part(task, part)
        if (task, part) not in self._gathered:
            self._gathered[task, part] = Gathered(self._pixels(task, part))
        return self._gathered[task, part]

    def test_ids(self, entry: str) -> set[str]:
        """Return the ids of the images of the "test" parts that are of a set, 'card' or 'card:split'."""
        return {
            name
            for named, parts in zip(self._named.values(), self._parts)
            for other, (images, _) in zip(named.test or named.train, parts["test"])
            if overlap(entry, other)
            for name in images.ids
        }

    def validation_groups(self, task: int) -> list[str]:
        """Return the group of each validation image of a task, [] for independent images."""
        part = self.part(task, "validation")
        return list(part.groups(torch.arange(len(part)))[0].values())

    def outside(self, *names: str) -> Gathered:
        """Return the images of sets that are not of any task, with the labels of each set."""
        sets = [self._sets.images(name, grouped=True) for name in names]
        return Gathered([(Pixels(images, self.size), images.labels) for images in sets])

    def _numbers(self, tasks: Sequence[str]) -> list[int]:
        return [number for number, name in enumerate(self.union.tasks) if not tasks or name in tasks]

    def _pixels(self, task: int, part: str) -> list[tuple[Pixels, Tensor]]:
        offset = self.union.offset(task)
        return [(Pixels(images, self.size), labels + offset) for images, labels in self._parts[task][part]]

    def _open_task(self, task: str, named: PartsConfig) -> tuple[list[str], dict[str, list[Chosen]]]:
        sets = [self._sets.images(entry, grouped=False) for entry in named.train]
        for images in sets:
            repeated = next((name for name in images.classes if images.classes.count(name) > 1), None)
            if repeated is not None:
                raise UserError(
                    f"tasks: {task}: '{images.name}' has two classes named '{repeated}'; give them different names."
                )
        classes = list(dict.fromkeys(name for images in sets for name in images.classes))
        parts = {
            part: [self._chosen(task, images, index, classes) for images, index in chosen]
            for part, chosen in divided(named, self._sets.images).items()
        }
        missing = set(range(len(classes))) - {label for _, labels in parts["train"] for label in labels.tolist()}
        if missing:
            raise UserError(f"tasks: {task}: no training image of class '{classes[min(missing)]}'; raise limit.")
        return classes, parts

    def _chosen(self, task: str, images: ImageSet, index: Tensor, classes: Sequence[str]) -> Chosen:
        places = {name: number for number, name in enumerate(classes)}
        numbers = torch.tensor([places.get(name, -1) for name in images.classes])
        labels = numbers[images.labels[index]]
        if bool((labels < 0).any()):
            unknown = images.classes[int(images.labels[index][labels < 0][0])]
            raise UserError(
                f"tasks: {task}: '{images.name}:{images.split}' has class '{unknown}', which training does not have."
            )
        return images if len(index) == len(images) else images.take(index.tolist()), labels
