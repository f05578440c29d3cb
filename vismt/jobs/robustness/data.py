"""The images of a robustness run: a seeded draw from each card, the same for every classifier, with labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError, require_known
from vismt.data.batching import InOrder
from vismt.data.image_set import named_groups
from vismt.data.images import ImageSet, open_images
from vismt.data.near_duplicates import with_groups
from vismt.data.pixels import Pixels
from vismt.data.set_entries import card_and_split, row_name
from vismt.jobs import open_run
from vismt.jobs.robustness.config import RobustnessConfig
from vismt.jobs.robustness.models import Classifier
from vismt.multitask.nets import TaskClassifier, Union


class Cards:
    """The cards of a run, opened once.

    runs: Run folders of the classifiers. Of a card that one of them trained or chose on, only the images of the test part of
    that run are taken, for all classifiers.
    """

    def __init__(self, config: RobustnessConfig, runs: Iterable[str] = ()) -> None:
        self.config = config
        self.runs = tuple(dict.fromkeys(runs))
        self._sets: dict[str, ImageSet] = {}
        self._pixels: dict[tuple[str, int], Pixels] = {}

    def images(self, name: str) -> ImageSet:
        """Return the set 'card' or 'card:split'.

        Raises UserError for a set of which a run has seen all images.
        """
        if name not in self._sets:
            images = open_images(
                *card_and_split(name), on_bad_sample=self.config.on_bad_sample, download=self.config.download
            )
            for run in self.runs:
                images = _unseen(images, name, run)
            images = self._sets[name] = with_groups(images)
            console.stage("data", f"{row_name(name)}   {len(images.classes)} classes   {len(images):,} images")
        return self._sets[name]

    def classifier(self, name: str, given: Classifier) -> Classifier:
        """Return a classifier as it answers on a set, by the softmax of the set's task if each task has its own."""
        if not given.separate:
            return given
        tasks = [label.partition("/")[0] for label in given.labels or ()]
        meant = list(dict.fromkeys(tasks[output] for output in self.outputs(name, given)))
        if len(meant) > 1:
            raise UserError(
                f"data: the classes of '{name}' are in the tasks {', '.join(meant)}, each with a softmax of its own; name one as "
                "classifier.task."
            )
        union = Union(tuple(dict.fromkeys(tasks)), tuple(Counter(tasks).values()))
        net = TaskClassifier(given.net, union, union.tasks.index(meant[0]), task_aware=True).eval()
        return replace(given, net=net)

    def opened(self, name: str, classifier: Classifier) -> AbstractContextManager[Pixels]:
        """Return the images of a set of other classes at a classifier's size."""
        return nullcontext(self._pixels_of(name, classifier))

    def for_fitting(self, name: str, classifier: Classifier) -> InOrder:
        """Return further images of a set, on which features are fitted. None is in a group with a drawn image."""
        settings, images, order = self.config.evaluate, self.images(name), self._order(name)
        start = settings.images or 0
        groups, _ = named_groups(images.ids, [(images, i) for i in range(len(images))])
        group_of = [groups.get(image, image) for image in images.ids]
        drawn = {group_of[i] for i in order[:start].tolist()}
        order = order[[i for i in range(start, len(order)) if group_of[int(order[i])] not in drawn]]
        if len(order) < settings.threshold_images:
            apart = " in other groups" if groups else ""
            raise UserError(
                f"evaluate.threshold_images: '{name}' has {len(order)} images besides the {start} evaluated ones{apart}, not "
                f"{settings.threshold_images}; lower evaluate.images or evaluate.threshold_images."
            )
        return self._batches(name, classifier, order[: settings.threshold_images])

    def _order(self, name: str) -> Tensor:
        """Return the numbers of the images of a set in their drawn order."""
        return torch.randperm(len(self.images(name)), generator=torch.Generator().manual_seed(self.config.seed))

    def batches(self, name: str, classifier: Classifier) -> InOrder:
        """Return the drawn images of a set at a classifier's size, with the labels of its outputs."""
        return self._batches(name, classifier, self._order(name)[: self.config.evaluate.images or None])

    def _batches(self, name: str, classifier: Classifier, order: Tensor) -> InOrder:
        images, settings = self.images(name), self.config.evaluate
        if len(order) < 2:
            raise UserError(f"data: '{name}' has {len(order)} image(s); an interval needs two or more.")
        outputs = torch.tensor(self.outputs(name, classifier))
        return InOrder(self._pixels_of(name, classifier), settings.batch, order, outputs[images.labels])

    def _pixels_of(self, name: str, classifier: Classifier) -> Pixels:
        key = (name, classifier.size)
        if key not in self._pixels:
            self._pixels[key] = Pixels(self.images(name), classifier.size)
        return self._pixels[key]

    def outputs(self, name: str, classifier: Classifier) -> list[int]:
        """Return the output index of each class of a set, by name if the outputs have names, else in the card's order.

        For a classifier of several tasks, only the task that the configuration names counts, or else the tasks with this card.
        """
        classes, labels = self.images(name).classes, classifier.labels
        tasks = self._tasks(name, classifier)
        if labels is None:
            if classifier.num_classes != len(classes):
                raise UserError(
                    f"data: the classifier has {classifier.num_classes} outputs, '{name}' has {len(classes)} classes; give one "
                    "that was trained on this set's classes in the card's order."
                )
            return list(range(len(classes)))
        places: dict[str, list[int]] = {}
        for number, label in enumerate(labels):
            task, _, of_task = label.partition("/")
            if task in tasks or not tasks:
                for text in {of_task} if tasks else {label, of_task}:
                    places.setdefault(text, []).append(number)
        for label in classes:
            if label not in places:
                raise UserError(f"data: '{name}' has class '{label}', which the classifier was not trained on.")
            if len(places[label]) > 1:
                found = ", ".join(labels[number].partition("/")[0] for number in places[label])
                raise UserError(
                    f"data: class '{label}' of '{name}' is in the tasks {found}; name one as classifier.task."
                )
        return [places[label][0] for label in classes]

    def _tasks(self, name: str, classifier: Classifier) -> list[str]:
        """Return the tasks whose outputs may be the classes of a set. [] for all outputs."""
        if classifier.task is None:
            card = row_name(card_and_split(name)[0])
            return [task for task, cards in classifier.cards.items() if card in cards]
        known = dict.fromkeys(label.partition("/")[0] for label in classifier.labels or () if "/" in label)
        require_known("classifier.task: no task", [classifier.task], known)
        return [classifier.task]


def _unseen(images: ImageSet, name: str, run: str) -> ImageSet:
    """Return the images of a set in the test part of a run, or all images if the run neither trained nor chose on the set."""
    tested = open_run(Path(run)).job.test_ids(name)
    if tested is None:
        return images
    kept = [number for number, image in enumerate(images.ids) if image in tested]
    if not kept:
        raise UserError(
            f"data: '{name}' shares examples with the training of the run '{run}', whose test part has no image of it; name "
            "another set or split, or leave data out, and the run is evaluated on its own test images."
        )
    console.stage("data", f"{row_name(name)}   {len(kept):,} of {len(images):,} images: the test part of {run}")
    return images.take(kept)
