"""Attacks that are made on one model and tried on another (Papernot et al., arXiv 1605.07277).

A few-shot task has a classifier of its own, so the source's is made from the same support as the evaluated model's. The
images are made anew for every evaluated model, with the same seeds: all of them see the same ones, and the source itself
sees its white-box attack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from vismt.robustness.attacks import AttackSpec


class Task(Protocol):
    """A model that turns a support set into a classifier of query images."""

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module: ...


class Source:
    """The model that attacks are made on, by name; `fingerprint` tells its weights from others.

    The classifier of the latest support is kept, so several attacks of one episode make it once.
    """

    def __init__(self, name: str, task: Task, fingerprint: str) -> None:
        self.name, self.fingerprint, self._task = name, fingerprint, task
        self._support: Tensor | None = None
        self._classifier: nn.Module | None = None

    def classifier(self, support: Tensor, labels: Tensor) -> nn.Module:
        """Support (s, 3, h, w) in [0, 1], labels (s,) -> the source's classifier of this episode, in eval mode."""
        if self._classifier is None or self._support is not support:
            self._classifier, self._support = self._task.classifier(support, labels).eval(), support
        return self._classifier


@dataclass(frozen=True)
class Transfer:
    """An attack as a condition of the few-shot protocol, made on `source` and not on the evaluated model."""

    spec: AttackSpec
    source: Source
    # Unlike a white-box attack it is one image for all, but the unchanged image is inside its budget all the same.
    worst_case: ClassVar[bool] = True

    @property
    def seed(self) -> int:
        return self.spec.seed

    def describe(self, num_classes: int | None = None) -> str:
        """The condition's text, "PGD-10 linf 4.5/255 from frozen"."""
        return f"{self.spec.describe(num_classes)} from {self.source.name}"

    def settings(self) -> dict[str, object]:
        """The attack's fields, the source and its fingerprint, for a protocol's hash."""
        return {**self.spec.settings(), "source": self.source.name, "source_fingerprint": self.source.fingerprint}

    def prepare(self, support: Tensor, labels: Tensor) -> _OnSource:
        """The attack of one episode, from its support (s, 3, h, w) in [0, 1] and labels (s,)."""
        return _OnSource(self.spec, self.source.classifier(support, labels))


@dataclass(frozen=True)
class _OnSource:
    """An attack whose model is already decided."""

    spec: AttackSpec
    classifier: nn.Module

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, seed: int) -> Tensor:
        """The images made on the source; `model`, which will see them, plays no part."""
        return self.spec.perturb(self.classifier, images, labels, num_classes=num_classes, seed=seed)
