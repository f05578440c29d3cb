"""Attacks that are computed on one model and evaluated on another (Papernot et al., arXiv 1605.07277).

Every few-shot task has its own classifier, so the source's is built from the same support as the evaluated model's. The
images are computed again for every evaluated model, with the same seeds: all of them get the same images, and the source
itself gets its white-box attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from vismt.metatune.protocol.interfaces import FewShotModel
from vismt.robustness.attacks.attacks import AttackSpec


class TransferSource:
    """The model that attacks are computed on, by name; `fingerprint` identifies its weights.

    The classifier of the latest support is kept, so several attacks of one episode build it once.
    """

    def __init__(self, name: str, task: FewShotModel, fingerprint: str) -> None:
        self.name, self.fingerprint, self._task = name, fingerprint, task
        self._support: Tensor | None = None
        self._classifier: nn.Module | None = None

    def classifier(self, support: Tensor, labels: Tensor) -> nn.Module:
        """Return the source's classifier of this episode, in eval mode; support (s, 3, h, w) in [0, 1], labels (s,)."""
        if self._classifier is None or self._support is not support:
            self._classifier, self._support = self._task.classifier(support, labels).eval(), support
        return self._classifier


@dataclass(frozen=True)
class Transfer:
    """An attack as a condition of the few-shot protocol, computed on `source` and not on the evaluated model."""

    spec: AttackSpec
    source: TransferSource
    kind: ClassVar[Literal["attack"]] = "attack"
    # Unlike a white-box attack it gives the same image for all, but the clean image is inside its budget all the same.
    worst_case: ClassVar[bool] = True

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def label(self) -> str:
        """The condition's text, "PGD-10 linf 4.5/255 from frozen"."""
        return self.describe()

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`, with the parts of an AutoAttack that run on fewer than 4 classes."""
        return f"{self.spec.describe(num_classes)} from {self.source.name}"

    def settings(self) -> dict[str, object]:
        """Return the attack's fields, the source and its fingerprint, for a protocol's hash."""
        return {**self.spec.settings(), "source": self.source.name, "source_fingerprint": self.source.fingerprint}

    def prepare(self, support: Tensor, labels: Tensor) -> _OnSource:
        """Return the attack of one episode from its support (s, 3, h, w) in [0, 1] and labels (s,)."""
        return _OnSource(self.spec, self.source.classifier(support, labels))


@dataclass(frozen=True)
class _OnSource:
    """An attack with a fixed source classifier."""

    spec: AttackSpec
    classifier: nn.Module

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, keys: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return the images computed on the source, all to the end; `model`, which is evaluated on them, is not used."""
        return self.spec.perturb(self.classifier, images, labels, num_classes=num_classes, keys=keys, exhaust=True)
