"""Blocks of few-shot episodes: the classifier of each support, and its predictions on the queries under every condition.

Blocks have fixed numbers of episodes. Attacks leave few surviving queries in each task. An attack may therefore pack the
queries of several tasks into one classifier, so that they fill the batches of the backbone that the tasks share:

    logits of row q = s_t cos(f(x_q), p_t),    t the task of q

The protocols at the top say what models, samplers, images and conditions have to provide.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.seeds import mix_seed
from vismt.data.set_entries import row_name
from vismt.metatune.features import FeatureStore, number
from vismt.metatune.functional import WithWeights, answers
from vismt.metatune.protocol.episode_outcome import EpisodeOutcome
from vismt.metatune.protocol.episodes import Episode, image_parts
from vismt.metatune.protonet import PrototypeClassifier
from vismt.uncertainty.features import Answers, Feature

_BLOCK = 8  # episodes that are run together


class FewShotModel(Protocol):
    """A model that turns a support set into a classifier of query images (ProtoNet, a pool with merging, ...)."""

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module: ...


class Sampler(Protocol):
    """Episodes by number, the smallest number of ways in an episode, and a JSON-able description of the rules."""

    min_ways: int

    def __getitem__(self, index: int) -> Episode: ...

    def describe(self) -> Mapping[str, object]: ...


class QueryPerturbation(Protocol):
    """A change of the query images (an attack or a corruption of `vismt.robustness`), and what a protocol records of the change.

    It has the method perturb(classifier, images, labels, *, num_classes, keys) -> images. Instead it may have
    prepare(support, labels), which is called once for each episode and returns such a function (`vismt.robustness.Transfer`).
    """

    @property
    def seed(self) -> int: ...

    def describe(self, num_classes: int | None = None) -> str: ...

    def settings(self) -> Mapping[str, object]: ...


class PixelStore(Protocol):
    """Images float (b, 3, h, w) in [0, 1] by int64 index (b,).

    If it has a text `key`, which differs for any other images, features are kept from run to run.
    """

    def __getitem__(self, index: Tensor) -> Tensor: ...


class OutsidePixels(PixelStore, Protocol):
    """A pixel store of a set of other classes, from which each episode draws.

    If it has `group_of` (n,), integers that are equal for images that depend on each other, it is divided by these groups.
    """

    def __len__(self) -> int: ...


def parts_of(sampler: Sampler) -> int:
    """Return the number of parts of a sampler that share no image. 0 for a sampler without parts."""
    return getattr(sampler, "parts", 0)


@dataclass
class _Task:
    index: int
    classifier: nn.Module
    outcome: EpisodeOutcome


@dataclass
class EpisodeRunner:
    """Runs blocks of episodes: the classifier of each support, and the predictions on its queries under every condition.

    outside: Sets of images of other classes by entry, each divided into as many parts as the sampler has. stores: Stores of the
    features of `pixels` (under "") and of the outside sets (by entry). The features of a set without a store are computed in
    every episode. asked: Features of the evaluation.
    """

    proto: FewShotModel
    pixels: PixelStore
    sampler: Sampler
    device: torch.device | str
    attacks: Mapping[str, QueryPerturbation] = field(default_factory=dict)
    worst: Mapping[str, Sequence[str]] = field(default_factory=dict)
    outside: Mapping[str, OutsidePixels] = field(default_factory=dict)
    stores: Mapping[str, FeatureStore] = field(default_factory=dict)
    batch: int = 256
    asked: Sequence[Feature] = ()
    _divided: dict[str, list[Tensor]] = field(default_factory=dict)  # parts of the outside sets

    def blocks(self, episodes: int) -> list[range]:
        """Return the numbers of the episodes that run together. Each runs alone if no attack packs."""
        size = _BLOCK if any(getattr(attack, "packs", False) for attack in self.attacks.values()) else 1
        return [range(start, min(start + size, episodes)) for start in range(0, episodes, size)]

    def __call__(self, block: range) -> dict[int, EpisodeOutcome]:
        outcomes: dict[int, EpisodeOutcome] = {}
        together: list[_Task] = []  # may be packed. Other tasks do not wait, because each may have weights of its own
        for index in block:
            task = self._task(index)
            key = pack_key(task.classifier)
            if together and (key is None or key != pack_key(together[0].classifier)):
                self._finish(together)
                together = []
            together.append(task)
            outcomes[index] = task.outcome
        self._finish(together)
        return outcomes

    def _finish(self, tasks: Sequence[_Task]) -> None:
        """Add the predictions under attacks and the values of features to the outcomes of tasks."""
        for name, attack in self.attacks.items():
            for group in self._groups(tasks, attack):
                self._perturb(group, name, attack)
        for task in tasks if self.asked else ():
            query, labels = task.outcome.query.to(self.device), task.outcome.episode.query_labels
            keys = [(task.index, place) for place in range(len(query))]
            net = partial(self._logits, task.classifier)
            answers = Answers(task.outcome.logits.double(), labels, net, query, keys)
            outside = {entry: self._outside_answers(task, entry) for entry in self.outside}
            for feature in self.asked:
                task.outcome.asked |= feature.means(answers, outside)

    def _task(self, index: int) -> _Task:
        episode = self.sampler[index]
        support = self.pixels[episode.support]
        query = self.pixels[episode.query]
        placed = number(support.to(self.device), self.stores.get(""), episode.support)
        classifier = self.proto.classifier(placed, episode.support_labels.to(self.device))
        if classifier.training:  # setting the mode of a large model that has it already takes time
            classifier.eval()
        clean = self._logits(classifier, query, self.stores.get(""), episode.query)
        outcome = EpisodeOutcome(
            episode,
            support,
            query,
            {"clean": clean.argmax(1)},
            clean,
            mixture=getattr(classifier, "mixture", None),
            worst=self.worst,
            strict=[name for name, attack in self.attacks.items() if getattr(attack, "worst_case", False)],
        )
        return _Task(index, classifier, outcome)

    def _outside_answers(self, task: _Task, entry: str) -> Answers:
        """Return the answers to as many images of another set as the episode has queries."""
        images, drawn_as = self.outside[entry], f"against {row_name(entry)}"
        part = self._outside_part(entry, drawn_as, task.index)
        generator = torch.Generator().manual_seed(mix_seed(task.index, "outside", drawn_as))
        rows = part[torch.randperm(len(part), generator=generator)[: len(task.outcome.query)]]
        logits = self._logits(task.classifier, images[rows], self.stores.get(entry), rows).double()
        return Answers(logits, torch.zeros(len(rows), dtype=torch.int64))

    def _outside_part(self, entry: str, drawn_as: str, index: int) -> Tensor:
        """Return the indices of the outside images from which an episode draws. Episodes of other parts do not draw them."""
        images, parts = self.outside[entry], parts_of(self.sampler)
        if not parts:
            return torch.arange(len(images))
        if entry not in self._divided:
            groups = getattr(images, "group_of", None)
            self._divided[entry] = image_parts(len(images), parts, mix_seed(0, "outside", drawn_as), groups)
        return self._divided[entry][index % parts]

    def _groups(self, tasks: Sequence[_Task], attack: QueryPerturbation) -> list[list[_Task]]:
        groups: list[list[_Task]] = []
        for task in tasks:
            key = pack_key(task.classifier) if getattr(attack, "packs", False) else None
            group = groups[-1] if groups else []
            queries = sum(len(other.outcome.query) for other in [*group, task])
            if group and key is not None and key == pack_key(group[0].classifier) and queries <= self.batch:
                group.append(task)
            else:
                groups.append([task])
        return groups

    def _perturb(self, group: Sequence[_Task], name: str, attack: Any) -> None:
        first, outcomes = group[0], [task.outcome for task in group]
        if hasattr(attack, "prepare"):
            labels = first.outcome.episode.support_labels
            perturb = attack.prepare(first.outcome.support.to(self.device), labels.to(self.device))
        else:  # `search` of an attack on this classifier also tells what it counts as broken
            perturb = getattr(attack, "search", attack.perturb)
        counts = [len(outcome.query) for outcome in outcomes]
        classifier = first.classifier
        if len(group) > 1:
            packed = [task.classifier for task in group if isinstance(task.classifier, PrototypeClassifier)]
            classifier = PackedClassifier(packed, counts)
        images = torch.cat([outcome.query for outcome in outcomes])
        labels = torch.cat([outcome.episode.query_labels for outcome in outcomes])
        # The random numbers of a query are a function of its key.
        places = [
            (task.index, *divmod(place, self.batch)) for task in group for place in range(len(task.outcome.query))
        ]
        keys = [(mix_seed(attack.seed, index, part), position) for index, part, position in places]
        changed, found = [], []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            placed = images[part].to(self.device), labels[part].to(self.device)
            found.append(perturb(classifier, *placed, num_classes=first.outcome.episode.ways, keys=keys[part]))
            changed.append(getattr(found[-1], "adversarial", found[-1]))
        logits = []
        for task, adversarial in zip(group, torch.cat(changed).split(counts), strict=True):
            logits.append(self._logits(task.classifier, adversarial))
            task.outcome.predictions[name] = logits[-1].argmax(1)
            if task.outcome.adversarial is None:
                task.outcome.adversarial = adversarial
        if hasattr(attack, "search"):
            parts = torch.cat(logits).split(self.batch)
            lost = torch.cat([outcome.lost(part, name).cpu() for outcome, part in zip(found, parts, strict=True)])
            for outcome, own in zip(outcomes, lost.split(counts), strict=True):
                outcome.lost[name] = int(own.sum())

    @torch.no_grad()
    def _logits(
        self, classifier: nn.Module, images: Tensor, store: FeatureStore | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the logits of images on the CPU. index: Rows (b,) of unchanged images in the set of the store."""
        parts = [part.to(self.device) for part in images.split(self.batch)]
        if index is not None:
            parts = [number(part, store, rows) for part, rows in zip(parts, index.split(self.batch))]
        return torch.cat([answers(classifier, part).cpu() for part in parts])


class PackedClassifier(nn.Module):
    """The classifiers of tasks with equal `pack_key`. counts: Number of query images of each task.

    `rows_of(images, rows)` classifies images (b, 3, h, w). rows: Positions (b,) in the concatenated queries.
    """

    directions: Tensor
    scales: Tensor
    owner: Tensor

    def __init__(self, tasks: Sequence[PrototypeClassifier], counts: Sequence[int]) -> None:
        super().__init__()
        self.backbone = tasks[0].backbone
        prototypes = torch.stack([task.prototypes for task in tasks]).float()
        self.register_buffer("directions", F.normalize(prototypes, dim=2, eps=1e-12), persistent=False)
        self.register_buffer("scales", torch.stack([task.scale.float() for task in tasks]), persistent=False)
        owner = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))
        self.register_buffer("owner", owner.to(prototypes.device), persistent=False)
        self.training = tasks[0].training

    def rows_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return logits (b, k) of each image under the task of its row."""
        features = F.normalize(self.backbone(images).float(), dim=1, eps=1e-12)
        task = self.owner[rows]
        return self.scales[task, None] * torch.einsum("bd,bkd->bk", features, self.directions[task])


def pack_key(classifier: nn.Module) -> Hashable | None:
    """Return a key that is equal for classifiers that can be packed together. None for a classifier that cannot be packed.

    Packed classifiers have the same number of prototypes, and the same backbone with the same weights.
    """
    if type(classifier) is not PrototypeClassifier:
        return None
    backbone = classifier.backbone
    weights: tuple[tuple[str, int], ...] = ()
    if isinstance(backbone, WithWeights):
        weights = tuple((name, weight.data_ptr()) for name, weight in backbone.weights.items())
        backbone = backbone.module
    return id(backbone), weights, tuple(classifier.prototypes.shape)
