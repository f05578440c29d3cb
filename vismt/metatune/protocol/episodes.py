"""Few-shot episodes of a labelled set: uniform N-way K-shot, and Meta-Dataset's variable ways and shots.

Triantafillou et al., Meta-Dataset, arXiv 1903.03096 (appendix on the sampling algorithm). With R_c the number of images
of class c outside the query set, N ways, u ~ U(0, 1) and a_c ~ U(log 1/2, log 2):

    queries per class  q   = min(10, floor(min_c |c| / 2))
    support in all     S   = min(500, sum_c floor(u * min(100, R_c) + 1))
    shots of class c   K_c = min(R_c, floor(p_c * (S - N)) + 1),   p_c proportional to |c| * exp(a_c)

Episodes that reuse images say how well a mean over episodes is known for these images. Two forms of uniform episodes say how
well it is known for new images. One is episodes in disjoint parts (`EpisodeSampler.parts`), whose means are independent. The
other is episodes without a shared image (`DisjointSampler`, Lafargue et al., TMLR 2024, arXiv 2409.02850). A part has a share
of the images of every class. If classes have too few images, a part has all images of a share of the classes. Both forms keep
the distribution of a single episode.

Images of one group (frames of one object) are in one part, and not in both support and queries. The queries of an episode come
from groups without a support image. Other groups are used only if these are too few. Parts are too small if they could force
more than a tenth of all queries into groups of the support, because this would change the distribution of an episode. In a
simulation with two groups of six images in each part, accuracies rose from 68 to 94 %.

Episode i of a sampler is a pure function of (seed, i). It has the same bits for any number of workers or ranks, and after a
resume. WordNet itself is left out. Its internal nodes are given as `nodes`, lists of leaf classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.seeds import digest, mix_seed
from vismt.uncertainty.intervals import Covers

FEWEST_PARTS = 4  # fewer have too few degrees of freedom
MOST_SHARED = 0.1  # of all queries, in groups of their episode's support


@dataclass(frozen=True)
class Episode:
    """A few-shot task.

    All tensors are int64. support, query: Indices (s,), (m,) into the labelled set. support_labels, query_labels: Labels (s,),
    (m,) in 0..N-1, in the order of `classes`. classes: Ids (N,) of the drawn classes.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    classes: Tensor

    @property
    def ways(self) -> int:
        return len(self.classes)


class LabelledSet:
    """The images of each class of a labelled set, from which episodes are drawn.

    labels: Integers (n,) >= 0. superclass: Superclass of each class, (n_classes,), or None. classes: Ids to draw from, by default
    all that occur. names: Class names for messages. groups: Integers (n,) that are equal for images that depend on each other.
    None if all images are independent. Raises UserError if labels, superclass, classes and groups do not fit each other.

    parts: Number of parts that share no image. Episode i draws from part i % parts. 0 if each episode draws from all images.
    covers: What an interval over the episodes covers.
    """

    parts = 0
    covers: Covers = "sampler"

    def __init__(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        superclass: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        groups: Tensor | None = None,
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
            raise UserError(f"episodes: no image in {_shorten(empty)}: add images or leave it out of classes.")
        self.superclass = None if superclass is None else torch.as_tensor(superclass).long().cpu()
        if self.superclass is not None and len(self.superclass) < size:
            raise UserError(
                f"episodes: superclass has {len(self.superclass)} entries for {size} classes: give each one."
            )
        if groups is not None and len(groups) != len(labels):
            raise UserError(f"episodes: {len(groups)} groups for {len(labels)} images: give each image one.")
        places = None if groups is None else torch.as_tensor(groups).unique(return_inverse=True)[1].flatten().cpu()
        # None also where every image is a group of its own
        self.group_of = None if places is None or int(places.max()) == len(labels) - 1 else places
        self._parts_by_group: dict[int, list[Tensor]] = {}

    def name(self, class_id: int) -> str:
        """Return "class 'oak'" if names are known, else "class 3"."""
        if self.names is not None and class_id < len(self.names):
            return f"class '{self.names[class_id]}'"
        return f"class {class_id}"

    def members(self, class_id: int) -> Tensor:
        """Return the indices of the images of a class, ascending, int64 (count,)."""
        start = int(self._start[class_id])
        return self._order[start : start + int(self.counts[class_id])]

    def part(self, class_id: int, part: int) -> Tensor:
        """Return the indices of the images of a class in one part, int64 (count // parts,).

        The part is a function of the seed, the class and its groups. Images that remain after the division are in no part. If a
        class has groups of several images, its parts have nearly the same sizes, and together all images.
        """
        if class_id in self._parts_by_group:
            return self._parts_by_group[class_id][part]
        members = self.members(class_id)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "parts", class_id))
        size = len(members) // self.parts
        return members[torch.randperm(len(members), generator=generator)[part * size : (part + 1) * size]]

    def divided_by_group(self, count: int) -> dict[int, list[Tensor]]:
        """Return `count` parts of each class with an image that is not alone in its group. No group is in two parts."""
        found: dict[int, list[Tensor]] = {}
        if self.group_of is None:
            return found
        placed: dict[int, int] = {}
        shared = self.group_of.bincount() > 1
        for class_id in self.classes.tolist():
            members = self.members(class_id)
            if not bool(shared[self.group_of[members]].any()):
                continue
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "parts", class_id))
            order = members[torch.randperm(len(members), generator=generator)]
            images: dict[int, list[int]] = {}
            for image, group in zip(order.tolist(), self.group_of[order].tolist()):
                images.setdefault(group, []).append(image)
            parts: list[list[int]] = [[] for _ in range(count)]
            # Those that another class has placed, then the largest, each into the smallest part.
            for group in sorted(images, key=lambda group: (group not in placed, -len(images[group]))):
                part = placed.setdefault(group, min(range(count), key=lambda number: len(parts[number])))
                parts[part] += images[group]
            found[class_id] = [torch.tensor(part, dtype=torch.int64) for part in parts]
        return found

    def class_sets(self, least: int) -> list[Tensor]:
        """Return the sets of classes that an episode may draw from: superclasses of at least `least` classes, or all classes."""
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

    @staticmethod
    def draw_group(groups: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Draw one of `groups` uniformly."""
        return groups[int(torch.randint(len(groups), (1,), generator=generator))]

    def generator(self, index: int) -> torch.Generator:
        """Return the generator of episode `index`."""
        if index < 0:
            raise IndexError(f"episode {index}: episodes are numbered from 0")
        return torch.Generator().manual_seed(mix_seed(self.seed, index))

    def draw(
        self, drawn: Tensor, shots: Sequence[int], queries: int, generator: torch.Generator, part: int | None = None
    ) -> Episode:
        """Draw shots[j] support and `queries` query images of each class j of `drawn` (N,), without replacement.

        part: Part of the images of each class to draw from. None for all images.
        """
        orders = []
        for class_id in drawn.tolist():
            members = self.members(class_id) if part is None else self.part(class_id, part)
            orders.append(members[torch.randperm(len(members), generator=generator)])
        support = torch.cat([order[:shot] for order, shot in zip(orders, shots, strict=True)])
        picked = [self.with_queries(order, shot, support)[: shot + queries] for order, shot in zip(orders, shots)]
        return self.episode(drawn, picked, shots, queries)

    def with_queries(self, order: Tensor, shots: int, support: Tensor) -> Tensor:
        """Return the support, then images of groups without a support image, then the other images. Each keeps its order."""
        if self.group_of is None:
            return order
        later = order[shots:]
        known = torch.isin(self.group_of[later], self.group_of[support])
        return torch.cat([order[:shots], later[~known], later[known]])

    @staticmethod
    def episode(drawn: Tensor, picked: Sequence[Tensor], shots: Sequence[int], queries: int) -> Episode:
        """Return the episode of classes (N,) and the images that were picked for each class, its support first."""
        pairs, ways = list(zip(picked, shots, strict=True)), torch.arange(len(drawn))
        support, query = (
            torch.cat(parts) for parts in zip(*((images[:shot], images[shot:]) for images, shot in pairs))
        )
        support_labels = ways.repeat_interleave(torch.as_tensor(list(shots)))
        return Episode(support, support_labels, query, ways.repeat_interleave(queries), drawn)

    def state(self, **rules: object) -> dict[str, object]:
        """Return `rules` with the seed and a hash of labels, classes and superclasses, which determine the episodes."""
        grouped = b"" if self.superclass is None else self.superclass.numpy().tobytes()
        content = self.labels.numpy().tobytes() + b"|" + self.classes.numpy().tobytes() + b"|" + grouped
        if self.group_of is not None:
            rules["groups"] = digest(self.group_of.numpy().tobytes())
        return {**rules, "seed": self.seed, "labels": digest(content)}


def image_parts(count: int, parts: int, seed: int, groups: Tensor | None = None) -> list[Tensor]:
    """Return the indices of each of the disjoint parts of `count` images, drawn at random. groups: Groups as in `LabelledSet`."""
    images = LabelledSet(torch.zeros(count), seed=seed, groups=groups)
    images.parts, images._parts_by_group = parts, images.divided_by_group(parts)
    return [images.part(0, part) for part in range(parts)]


def query_size(counts: Tensor, limit: int = 10) -> int:
    """Return the queries per class, min(limit, floor(smallest class / 2)). counts: Number (N,) of images of each drawn class."""
    return min(limit, int(counts.min()) // 2)


def support_total(remaining: Tensor, u: float, contribution: int = 100, limit: int = 500) -> int:
    """Return the number of support images, min(limit, sum_c floor(u * min(contribution, R_c) + 1)).

    remaining: Images R (N,) outside the query set. u: Number in [0, 1].
    """
    shares = torch.floor(u * remaining.clamp(max=contribution).double() + 1)
    return min(limit, int(shares.sum()))


def support_shots(counts: Tensor, remaining: Tensor, total: int, log_weights: Tensor) -> Tensor:
    """Return the shots of each class, min(R_c, floor(p_c (total - N)) + 1), int64 (N,).

    p_c is proportional to |c| exp(log_weights_c). counts: Images |c| of each class (N,). remaining: Images R (N,) outside the
    query set. log_weights: Logarithms (N,) of the random weights.
    """
    weights = counts.double() * log_weights.double().exp()
    shares = weights / weights.sum()
    return torch.minimum(remaining, torch.floor(shares * (total - len(counts))).long() + 1)


class EpisodeSampler(LabelledSet):
    """Uniform N-way K-shot episodes. `sampler[i]` is a pure function of (seed, i).

    In a loader: `DataLoader(sampler, batch_size=None, sampler=range(episodes), num_workers=...)`.

    Args:
        labels: Labels of the images, integers (n,).
        ways: Number N of classes in an episode, at least 2.
        shots: Number K of support images of each class, at least 1.
        queries: Number Q of query images of each class, at least 1.
        seed: Seed of all episodes.
        superclass: Superclass of each class, (n_classes,). An episode then draws a superclass and its ways within it, both
            uniformly.
        classes: Ids to draw from (a split), by default all.
        names: Class names for messages.
        groups: Integers (n,) that are equal for images that depend on each other. None if all images are independent.
        parts: Largest number of disjoint parts. The images of each class are divided, into as many parts as the smallest class
            has images and groups for. If there would be fewer than FEWEST_PARTS, the classes are divided (superclasses stay
            whole), into parts of at least `ways` classes. If a part would still have fewer, no parts are made.

    Raises:
        UserError: If ways < 2, shots or queries < 1, classes are empty or too few, or a class has fewer than K + Q images.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        superclass: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        groups: Tensor | None = None,
        parts: int = 0,
    ) -> None:
        for field, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
            if value < least:
                raise UserError(f"episodes: {field} is {value}: it must be at least {least}.")
        super().__init__(labels, seed=seed, superclass=superclass, classes=classes, names=names, groups=groups)
        self.ways = self.min_ways = self.max_ways = ways
        self.shots, self.queries = shots, queries
        need = shots + queries
        small = [f"{self.name(c)} ({int(self.counts[c])})" for c in self.classes.tolist() if self.counts[c] < need]
        if small:
            raise UserError(
                f"episodes: {shots} shots + {queries} queries take {need} images of a class, too few in {_shorten(small)}: "
                "lower shots or queries, or leave these classes out."
            )
        self._groups = self.class_sets(ways)
        self._groups_by_part = [self._groups]  # several where the parts are parts of the classes
        fitting = min(parts, int(self.counts[self.classes].min()) // need)
        found = next((count for count in range(fitting, FEWEST_PARTS - 1, -1) if self._fits(count)), 0)
        if found:
            self.parts, self.covers, self._parts_by_group = found, "images", self.divided_by_group(found)
        elif divided := self._divided(parts):
            self._groups_by_part, self.parts, self.covers = divided, len(divided), "classes"

    def _fits(self, count: int) -> bool:
        """Return whether `count` parts of the images of each class have enough of them, and enough groups."""
        divided = list(chain.from_iterable(self.divided_by_group(count).values()))
        if any(len(images) < self.shots + self.queries for images in divided):
            return False
        return sum(map(self._most_shared, divided)) <= MOST_SHARED * count * len(self.classes)

    def _most_shared(self, images: Tensor) -> float:
        """Return the largest possible share of the queries of a class in one part that are in groups of its support."""
        assert self.group_of is not None
        sizes = self.group_of[images].unique(return_counts=True)[1].sort(descending=True).values
        apart = len(images) - int(sizes[: self.shots].sum())
        return max(0, self.queries - apart) / self.queries

    def _divided(self, most: int) -> list[list[Tensor]]:
        """Return the groups of classes of each part, divided at random. [] if there would be fewer than FEWEST_PARTS."""
        whole = len(self._groups) > 1
        count = min(most, len(self._groups) if whole else len(self._groups[0]) // self.ways)
        if count < FEWEST_PARTS:
            return []
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "parts"))
        order = torch.randperm(len(self._groups if whole else self._groups[0]), generator=generator)
        if whole:
            return [[self._groups[number] for number in part] for part in order.tensor_split(count)]
        return [[self._groups[0][part]] for part in order.tensor_split(count)]

    def __getitem__(self, index: int) -> Episode:
        generator = self.generator(index)
        group = self.draw_group(self._groups_by_part[index % len(self._groups_by_part)], generator)
        drawn = group[torch.randperm(len(group), generator=generator)[: self.ways]]
        part = index % self.parts if self.covers == "images" else None
        return self.draw(drawn, [self.shots] * self.ways, self.queries, generator, part)

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"

    def describe(self) -> dict[str, object]:
        """Return what determines the episodes, JSON-able, for a protocol's hash."""
        parts = {"parts" if self.covers == "images" else "parts of classes": self.parts} if self.parts else {}
        return self.state(rule="uniform", ways=self.ways, shots=self.shots, queries=self.queries, **parts)


class DisjointSampler(EpisodeSampler):
    """Uniform episodes that share no image, and no group of a class. len(sampler) is the number of episodes.

    Every class is in the same number of episodes, which the smallest class limits. If episodes stay within a superclass, every
    superclass is in the same number of episodes too. Otherwise large classes would weigh more than in episodes that reuse images,
    and the mean would be another one. The arguments are the arguments of EpisodeSampler, without parts. Raises UserError also if
    there are fewer than two episodes.
    """

    covers: Covers = "images"

    def __init__(self, labels: Tensor, **settings: Any) -> None:
        super().__init__(labels, **settings)
        self._episodes = self._drawn()
        if len(self) < 2:
            raise UserError(
                f"episodes: the images are enough for {len(self)} episode(s) without a shared one, and an interval needs two: "
                "lower ways, shots or queries."
            )

    def _drawn(self) -> list[Episode]:
        generator = self.generator(0)
        left = {}
        for class_id in torch.cat(self._groups).tolist():
            members = self.members(class_id)
            left[class_id] = list(self._turns(members[torch.randperm(len(members), generator=generator)]))
        turns = min(map(len, left.values()))
        left = {class_id: images[:turns] for class_id, images in left.items()}
        rounds = min(len(group) * turns // self.ways for group in self._groups)
        episodes = []
        for number in range(rounds * len(self._groups)):
            group = self._groups[number % len(self._groups)]
            shuffled = group[torch.randperm(len(group), generator=generator)].tolist()
            # Those with the most turns left, so that no class is left over with several.
            drawn = sorted(shuffled, key=lambda c: -len(left[c]))[: self.ways]
            picked = [left[c].pop() for c in drawn]
            episodes.append(self.episode(torch.tensor(drawn), picked, [self.shots] * self.ways, self.queries))
        return episodes

    def _turns(self, order: Tensor) -> Iterator[Tensor]:
        """Yield the images of a class for one episode after the other."""
        need = self.shots + self.queries
        while len(order) >= need:
            order = self.with_queries(order, self.shots, order[: self.shots])
            taken, order = order[:need], order[need:]
            if self.group_of is not None:
                order = order[~torch.isin(self.group_of[order], self.group_of[taken])]
            yield taken

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, index: int) -> Episode:
        return self._episodes[index]

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "rule": "uniform without replacement"}


class VariableSampler(LabelledSet):
    """Episodes of Meta-Dataset with variable ways and shots. `sampler[i]` is a pure function of (seed, i).

    The formulas are in this file's header. The ways depend on the hierarchy:

    - Without a hierarchy, the ways are uniform in [min_ways, min(max_ways, classes)].
    - With `superclass` (n_classes,), such as Omniglot's alphabets, a superclass of at least min_ways classes is drawn, and then
      ways within it by the same rule.
    - With `nodes`, such as the internal nodes of ImageNet's hierarchy, each a list of its leaf classes, a node of min_ways to
      max_leaves leaves is drawn. The episode has all of its leaves, or max_ways of them if there are more.

    The AMT paper's "5-way 1-shot" is min_ways = max_ways = 5, max_contribution = 1. Raises UserError as EpisodeSampler does. A
    class needs 2 images.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        nodes: Sequence[Sequence[int]] | None = None,
        min_ways: int = 5,
        max_ways: int = 50,
        max_queries: int = 10,
        max_support: int = 500,
        max_contribution: int = 100,
        max_leaves: int = 392,
        seed: int = 0,
        superclass: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        groups: Tensor | None = None,
    ) -> None:
        if not 2 <= min_ways <= max_ways <= max_support or max_queries < 1 or max_contribution < 1:
            raise UserError(
                f"episodes: ways {min_ways} to {max_ways}, support {max_support}, queries {max_queries}, contribution "
                f"{max_contribution}: need 2 <= min_ways <= max_ways <= max_support, the others at least 1."
            )
        if nodes is not None and superclass is not None:
            raise UserError(
                "episodes: superclass and nodes both given: a data set has one hierarchy, pass one of them."
            )
        super().__init__(labels, seed=seed, superclass=superclass, classes=classes, names=names, groups=groups)
        self.min_ways, self.max_ways, self.max_queries, self.nodes = min_ways, max_ways, max_queries, nodes
        self.max_support, self.max_contribution, self.max_leaves = max_support, max_contribution, max_leaves
        single = [self.name(c) for c in self.classes.tolist() if self.counts[c] < 2]
        if single:
            raise UserError(
                f"episodes: 1 image in {_shorten(single)}, support and query need 2: leave these classes out."
            )
        if nodes is None:
            self._groups = self.class_sets(min_ways)
            return
        leaves = [self.classes[torch.isin(self.classes, torch.as_tensor(list(node)))] for node in nodes]
        self._groups = [group for group in leaves if min_ways <= len(group) <= max_leaves]
        if not self._groups:
            raise UserError(
                f"episodes: none of {len(nodes)} nodes has {min_ways} to {max_leaves} leaf classes here: lower min_ways."
            )

    def __getitem__(self, index: int) -> Episode:
        generator = self.generator(index)
        group = self.draw_group(self._groups, generator)
        ways = min(self.max_ways, len(group))
        if self.nodes is None:
            ways = int(torch.randint(self.min_ways, ways + 1, (1,), generator=generator))
        drawn = group[torch.randperm(len(group), generator=generator)[:ways]]
        counts = self.counts[drawn]
        queries = query_size(counts, self.max_queries)
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        total = support_total(counts - queries, u, self.max_contribution, self.max_support)
        log_weights = (2 * torch.rand(ways, generator=generator, dtype=torch.float64) - 1) * math.log(2)
        shots = support_shots(counts, counts - queries, total, log_weights)
        return self.draw(drawn, shots.tolist(), queries, generator)

    def __str__(self) -> str:
        fixed = self.min_ways == self.max_ways
        return f"{self.min_ways}-way variable shot" if fixed else "variable way and shot"

    def describe(self) -> dict[str, object]:
        """Return what determines the episodes, JSON-able, for a protocol's hash."""
        fields = ("min_ways", "max_ways", "max_queries", "max_support", "max_contribution", "max_leaves")
        nodes = None if self.nodes is None else digest(repr([list(node) for node in self.nodes]).encode())
        return self.state(rule="meta-dataset", nodes=nodes, **{field: getattr(self, field) for field in fields})


def _shorten(items: Sequence[str]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
