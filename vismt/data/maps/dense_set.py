"""Sources of images with per-pixel maps: what each kind loads, and the checks that several kinds share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.formats.derived import edges_from_depth, edges_from_labels
from vismt.data.maps.dense_sample import Sample
from vismt.data.source_types import Card, DataSource, check_names

CAMERA = ("fx", "fy", "cx", "cy")


@dataclass(frozen=True)
class DenseSet:
    """One split of a dense set; `read(i)` gives the sample of image i, see dense_sample.py.

    Attributes:
        classes: names of the values of semseg.
        targets: those that the samples may have.
        ids: name of each image.
        stored: the sample of image i without the derived edges.
        parts: names of the values of parts.
        inverse_depth: whether the depth target holds multiples of 1/depth.
        where: the folder of the copy, as messages name it.
        image_classes: names of the values of class.
        labels: int64 (n,), the class of every image; None where images have none.
        edges: the target that edges are derived from, "semseg" or "depth"; None when `stored` has all targets.
        groups: as of an ImageSet.
    """

    name: str
    split: str
    classes: list[str]
    targets: list[str]
    ids: list[str]
    stored: Callable[[int], Sample]
    parts: list[str] = field(default_factory=list)
    inverse_depth: bool = False
    where: str = ""
    image_classes: list[str] = field(default_factory=list)
    labels: Tensor | None = None
    edges: str | None = None
    groups: Mapping[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int, change: Callable[[Sample], Sample] | None = None) -> Sample:
        """Return the sample of image i in its own size, or `change` of it.

        Edges are derived from the changed map: resized ones would have gaps and lines of two pixels.
        """
        sample = self.stored(i) if change is None else change(self.stored(i))
        if self.edges is None or self.edges not in sample:
            return sample
        derive = edges_from_labels if self.edges == "semseg" else edges_from_depth
        return {**sample, "edge": derive(sample[self.edges])}


@dataclass(frozen=True, kw_only=True)
class DenseSource(DataSource):
    """A source of images with per-pixel maps."""

    family: ClassVar[str] = "images with maps"
    opener: ClassVar[str] = "open_dense"

    @abstractmethod
    def load(self, card: Card, base: Path, split: str) -> DenseSet:
        """Return `split` of the copy in the folder `base`."""

    @property
    def inverse_depth(self) -> bool:
        """Whether the depth target holds multiples of 1/depth."""
        return False


def check_camera(camera: Mapping[str, float], where: str) -> None:
    """Raise UserError unless `camera` has fx, fy, cx, cy with focal lengths above 0."""
    if set(camera) != set(CAMERA) or min(camera["fx"], camera["fy"]) <= 0:
        raise UserError(f"{where}: camera {camera} must give {', '.join(CAMERA)} in pixels, fx and fy above 0.")
