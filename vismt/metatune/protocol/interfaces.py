"""What the few-shot protocol asks of its models, samplers, images and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from vismt.metatune.protocol.labelled import Episode


class FewShotModel(Protocol):
    """A model that turns a support set into a classifier of query images (ProtoNet, a pool with merging, ...)."""

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module: ...


class Sampler(Protocol):
    """Episodes by number, the least number of ways in an episode, and a JSON-able description of the rules."""

    min_ways: int

    def __getitem__(self, index: int) -> Episode: ...

    def describe(self) -> Mapping[str, object]: ...


class QueryCondition(Protocol):
    """What a protocol records of a change of the query images: its seed, its text and its settings."""

    @property
    def seed(self) -> int: ...

    def describe(self, num_classes: int | None = None) -> str: ...

    def settings(self) -> Mapping[str, object]: ...


class Perturbs(Protocol):
    """An object that changes images (b, 3, h, w) in [0, 1] with labels (b,)."""

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, keys: Sequence[tuple[int, int]]
    ) -> Tensor: ...


class QueryPerturbation(QueryCondition, Perturbs, Protocol):
    """A change of the query images: an attack or a corruption of `vismt.robustness`."""


class PreparedPerturbation(QueryCondition, Protocol):
    """A change of the query images that needs the episode's support (`vismt.robustness.attacks.transfer.Transfer`).

    `prepare` is called once an episode and returns the object that perturbs the images.
    """

    def prepare(self, support: Tensor, labels: Tensor) -> Perturbs: ...


class PixelStore(Protocol):
    """Images float (b, 3, h, w) in [0, 1] by int64 index (b,).

    One with a text `key`, which differs for any other images, lets features be kept from run to run.
    """

    def __getitem__(self, index: Tensor) -> Tensor: ...


class OutsidePixels(PixelStore, Protocol):
    """A pixel store of a set of other classes, from which each episode draws."""

    def __len__(self) -> int: ...
