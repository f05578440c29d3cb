"""Blocks of few-shot episodes: the classifier of each support, and its predictions on the queries under every condition.

Blocks have fixed numbers of episodes, so that an attack can pack the queries of several tasks (packed.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.seeds import mix_seed
from vismt.metatune.features import FeatureStore, number
from vismt.metatune.functional import answers
from vismt.metatune.protocol.episode_outcome import EpisodeOutcome
from vismt.metatune.protocol.interfaces import (
    FewShotModel,
    OutsidePixels,
    Perturbs,
    PixelStore,
    PreparedPerturbation,
    QueryPerturbation,
    Sampler,
)
from vismt.metatune.protocol.labelled import Episode
from vismt.metatune.protocol.packed import PackedClassifier, pack_key
from vismt.metatune.protonet import PrototypeClassifier
from vismt.storage.records import Records

BLOCK = 8  # episodes that are run together


def outside_rows(name: str, images: int, episode: int, count: int) -> Tensor:
    """Return the rows (count,), at most all, that an episode draws of a set of other classes."""
    generator = torch.Generator().manual_seed(mix_seed(episode, "outside", name))
    return torch.randperm(images, generator=generator)[:count]


@dataclass
class _Task:
    """One episode: its images, its classifier on the device, and what was found so far, as in EpisodeOutcome."""

    index: int
    episode: Episode
    support: Tensor
    query: Tensor
    classifier: nn.Module
    predictions: dict[str, Tensor]
    logits: Tensor
    outside: dict[str, Tensor]
    adversarial: Tensor | None = None
    lost: dict[str, int] = field(default_factory=dict)


@dataclass
class EpisodeRunner:
    """Runs blocks of episodes: the classifier of each support, and the predictions on its queries under every condition."""

    proto: FewShotModel
    pixels: PixelStore
    sampler: Sampler
    attacks: dict[str, QueryPerturbation | PreparedPerturbation]
    device: torch.device | str
    batch: int
    worst: Mapping[str, Sequence[str]]
    store: FeatureStore | None
    outside: Mapping[str, tuple[OutsidePixels, FeatureStore | None]] = field(default_factory=dict)

    def blocks(self, episodes: int) -> list[range]:
        """Return the numbers of the episodes that run together; single ones where no attack packs."""
        size = BLOCK if any(getattr(attack, "packs", False) for attack in self.attacks.values()) else 1
        return [range(start, min(start + size, episodes)) for start in range(0, episodes, size)]

    def missing(self, log: Records, episodes: int) -> list[range]:
        """Return the blocks that are not on record."""
        return [block for block in self.blocks(episodes) if any(index not in log for index in block)]

    def __call__(self, block: range) -> dict[int, EpisodeOutcome]:
        strict = [name for name, attack in self.attacks.items() if getattr(attack, "worst_case", False)]
        tasks = [self._task(index) for index in block]
        for name, attack in self.attacks.items():
            for group in self._groups(tasks, attack):
                self._perturb(group, name, attack)
        return {
            task.index: EpisodeOutcome(
                task.episode,
                task.support,
                task.query,
                task.predictions,
                task.logits,
                task.adversarial,
                getattr(task.classifier, "mixture", None),
                self.worst,
                strict,
                task.outside,
                task.lost,
            )
            for task in tasks
        }

    def _task(self, index: int) -> _Task:
        episode = self.sampler[index]
        support = self.pixels[episode.support]
        query = self.pixels[episode.query]
        placed = number(support.to(self.device), self.store, episode.support)
        classifier = self.proto.classifier(placed, episode.support_labels.to(self.device)).eval()
        clean = self._logits(classifier, query, self.store, episode.query)
        outside = {}
        for name, (images, store) in self.outside.items():
            rows = outside_rows(name, len(images), index, len(query))
            outside[name] = self._logits(classifier, images[rows], store, rows)
        return _Task(index, episode, support, query, classifier, {"clean": clean.argmax(1)}, clean, outside)

    def _groups(self, tasks: Sequence[_Task], attack: QueryPerturbation | PreparedPerturbation) -> list[list[_Task]]:
        """Return the tasks in groups that one run of the attack perturbs together."""
        groups: list[list[_Task]] = []
        for task in tasks:
            key = pack_key(task.classifier) if getattr(attack, "packs", False) else None
            queries = sum(len(other.query) for other in groups[-1]) + len(task.query) if groups else 0
            joins = groups and key is not None and key == pack_key(groups[-1][0].classifier) and queries <= self.batch
            if joins:
                groups[-1].append(task)
            else:
                groups.append([task])
        return groups

    def _perturb(self, group: Sequence[_Task], name: str, attack: QueryPerturbation | PreparedPerturbation) -> None:
        """Add the predictions under one condition to the tasks of a group."""
        first = group[0]
        run: Perturbs = attack  # type: ignore[assignment]
        if hasattr(attack, "prepare"):
            run = attack.prepare(first.support.to(self.device), first.episode.support_labels.to(self.device))
        classifier = first.classifier
        counts = [len(task.query) for task in group]
        if len(group) > 1:
            packed = [task.classifier for task in group if isinstance(task.classifier, PrototypeClassifier)]
            classifier = PackedClassifier(packed, counts)
        images = torch.cat([task.query for task in group])
        labels = torch.cat([task.episode.query_labels for task in group])
        keys = [key for task in group for key in self._keys(attack.seed, task)]
        perturb: Any = getattr(
            run, "search", run.perturb
        )  # of an attack on this classifier, what it counts as broken, too
        changed, found = [], []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            placed = images[part].to(self.device), labels[part].to(self.device)
            found.append(perturb(classifier, *placed, num_classes=first.episode.ways, keys=keys[part]))
            changed.append(getattr(found[-1], "adversarial", found[-1]))
        logits = []
        for task, adversarial in zip(group, torch.cat(changed).split(counts), strict=True):
            logits.append(self._logits(task.classifier, adversarial))
            task.predictions[name] = logits[-1].argmax(1)
            task.adversarial = adversarial if task.adversarial is None else task.adversarial
        if hasattr(run, "search"):
            parts = torch.cat(logits).split(self.batch)
            lost = torch.cat([outcome.lost(part, name).cpu() for outcome, part in zip(found, parts, strict=True)])
            for task, own in zip(group, lost.split(counts), strict=True):
                task.lost[name] = int(own.sum())

    def _keys(self, seed: int, task: _Task) -> list[tuple[int, int]]:
        """Return the key of each query of a task, of which its random numbers are a function."""
        places = (divmod(place, self.batch) for place in range(len(task.query)))
        return [(mix_seed(seed, task.index, part), position) for part, position in places]

    @torch.no_grad()
    def _logits(
        self,
        classifier: nn.Module,
        images: Tensor,
        store: FeatureStore | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of images on the CPU; index (b,): their rows in the set of the store, where they are unchanged."""
        parts = [part.to(self.device) for part in images.split(self.batch)]
        if index is not None:
            parts = [number(part, store, rows) for part, rows in zip(parts, index.split(self.batch))]
        return torch.cat([answers(classifier, part).cpu() for part in parts])
