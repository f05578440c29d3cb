"""Sources of labelled images: what each kind loads, and checks that several kinds share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from vismt.base.errors import UserError, near
from vismt.data.source_types import MOST_CLASSES, Card, DataSource, check_names


@dataclass
class LoadedImages:
    """Labelled images of one split, before the card's names of classes are applied.

    Attributes:
        classes: names of the classes, as the copy has them.
        labels: class of each image, 0..len(classes)-1.
        ids: name of each image, stable between runs.
        read: image i as uint8 (3, h, w), native size.
        content: a text that differs for any other content.
        above: superclass of each class; empty where the copy does not say.
        nodes: class ids below each node of a hierarchy; empty where the copy does not say.
    """

    classes: list[str]
    labels: list[int]
    ids: list[str]
    read: Callable[[int], Tensor]
    content: Callable[[], str]
    above: list[str] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_names((*self.classes, *self.ids))


@dataclass(frozen=True, kw_only=True)
class ImageSource(DataSource):
    """A source of labelled images."""

    family: ClassVar[str] = "labelled images"
    opener: ClassVar[str] = "open_images"

    @abstractmethod
    def load(self, card: Card, base: Path, split: str) -> LoadedImages:
        """Return `split` of the copy in the folder `base`."""


def check_classes_per_split(
    splits: Iterable[str], classes_per_split: Mapping[str, int], allowed: Iterable[str], where: str
) -> None:
    """Raise UserError for the name of a split that is not `allowed` and for a negative number of classes."""
    names = list(allowed)
    unknown = next((name for name in (*splits, *classes_per_split) if name not in names), None)
    if unknown is not None:
        raise UserError(f"{where}: no split '{unknown}'.{near(unknown, names)}")
    if any(not 0 <= count <= MOST_CLASSES for count in classes_per_split.values()):
        raise UserError(f"{where}: 'classes_per_split' must hold counts of classes, at most {MOST_CLASSES:,}.")
