"""The images of each class, and the draw of an episode from them: the base of every sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.seeds import digest, mix_seed


@dataclass(frozen=True)
class Episode:
    """A few-shot task.

    support (s,) and query (m,) are indices into the labelled set; support_labels (s,) and query_labels (m,) run 0..N-1 in
    the order of classes (N,), the ids of the drawn classes. All are int64.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    classes: Tensor

    @property
    def ways(self) -> int:
        return len(self.classes)


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """Return the first items of a list for a message, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


class LabelledSet:
    """The images of each class of a labelled set, from which episodes are drawn.

    labels (n,) integers >= 0; superclass (n_classes,) or None; classes: ids to draw from, by default all that occur;
    names: class names for messages. Raises UserError for labels, superclass or classes that do not fit each other.
    """

    def __init__(
        self,
        labels: Tensor,
        seed: int,
        superclass: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        labels = torch.as_tensor(labels).long().flatten().cpu()
        if not len(labels) or int(labels.min()) < 0:
            raise UserError(f"episodes: {len(labels)} labels given, need one or more, all >= 0: check the data set.")
        self.labels, self.seed, self.names = labels, int(seed), names
        size = max(int(labels.max()) + 1, len(superclass) if superclass is not None else 0)
        self.counts = torch.bincount(labels, minlength=size)
        self._order = torch.argsort(labels, stable=True)
        self._start = self.counts.cumsum(0) - self.counts
        self.classes = labels.unique() if classes is None else torch.as_tensor(classes).long().unique()
        unknown = [c for c in self.classes.tolist() if not 0 <= c < size]
        if unknown:
            raise UserError(
                f"episodes: classes names id {unknown[0]}, the labels have 0 to {size - 1}: correct the list."
            )
        empty = [self.name(c) for c in self.classes.tolist() if not self.counts[c]]
        if empty:
            raise UserError(f"episodes: no image in {shorten(empty)}: add images or leave it out of classes.")
        self.superclass = None if superclass is None else torch.as_tensor(superclass).long().cpu()
        if self.superclass is not None and len(self.superclass) < size:
            raise UserError(
                f"episodes: superclass has {len(self.superclass)} entries for {size} classes: give each one."
            )

    def name(self, class_id: int) -> str:
        """Return "class 'oak'" where names are known, else "class 3"."""
        named = self.names is not None and class_id < len(self.names)
        return f"class '{self.names[class_id]}'" if named else f"class {class_id}"

    def members(self, class_id: int) -> Tensor:
        """Return the indices of the images of a class, ascending, int64 (count,)."""
        start = int(self._start[class_id])
        return self._order[start : start + int(self.counts[class_id])]

    def groups(self, least: int) -> list[Tensor]:
        """Return the sets of classes that an episode may draw from: superclasses of at least `least` classes, else all."""
        if self.superclass is None:
            if len(self.classes) < least:
                raise UserError(f"episodes: {len(self.classes)} classes cannot give {least} ways: lower ways.")
            return [self.classes]
        superclasses = self.superclass[self.classes]
        groups = [self.classes[superclasses == superclass] for superclass in superclasses.unique()]
        usable = [group for group in groups if len(group) >= least]
        if not usable:
            most = max(map(len, groups), default=0)
            raise UserError(
                f"episodes: the largest superclass has {most} classes, which cannot give {least} ways: "
                "lower ways or leave superclass out."
            )
        return usable

    def generator(self, index: int) -> torch.Generator:
        """Return the generator of episode `index`."""
        if index < 0:
            raise IndexError(f"episode {index}: episodes are numbered from 0")
        return torch.Generator().manual_seed(mix_seed(self.seed, index))

    def draw(self, drawn: Tensor, shots: Sequence[int], queries: int, generator: torch.Generator) -> Episode:
        """Draw shots[j] support and `queries` query images of each class j of `drawn` (N,), without replacement."""
        support, query = [], []
        for class_id, shot in zip(drawn.tolist(), shots, strict=True):
            members = self.members(class_id)
            picked = members[torch.randperm(len(members), generator=generator)[: shot + queries]]
            support.append(picked[:shot])
            query.append(picked[shot:])
        ways = torch.arange(len(drawn))
        support_labels = ways.repeat_interleave(torch.as_tensor(list(shots)))
        return Episode(torch.cat(support), support_labels, torch.cat(query), ways.repeat_interleave(queries), drawn)

    def state(self, **rules: object) -> dict[str, object]:
        """Return `rules` with the seed and a hash of labels, classes and superclasses, which determine the episodes."""
        grouped = b"" if self.superclass is None else self.superclass.numpy().tobytes()
        content = self.labels.numpy().tobytes() + b"|" + self.classes.numpy().tobytes() + b"|" + grouped
        return {**rules, "seed": self.seed, "labels": digest(content)}


def draw_group(groups: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Draw one of `groups` uniformly."""
    return groups[int(torch.randint(len(groups), (1,), generator=generator))]
