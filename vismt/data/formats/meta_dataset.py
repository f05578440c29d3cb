"""Domains of Meta-Dataset (Triantafillou et al., arXiv 1903.03096), as its own conversion or that of P>M>F leaves them.

A class with the number k is the file `k.tfrecords` of Meta-Dataset's conversion, one tf.train.Example an image with `image`
(JPEG or PNG) and `label` (k); or the file `k.h5` of P>M>F (Hu et al., arXiv 2204.07305) with one group `0`, `1`, ... an image
(dataset `image`, uint8 (h, w, 3), RGB); or a folder of image files called by its name. `dataset_spec.json` numbers the
classes: those of the training split first, then validation, then test. It also holds what the episodes draw from: Omniglot's
alphabets, ImageNet's part of WordNet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from vismt.base.errors import UserError, near
from vismt.data.copies import fix, shown_path, verify_classes, verify_counts
from vismt.data.formats.class_files import FORMS, ClassImages, open_class
from vismt.data.image_source import ImageSource, LoadedImages, check_classes_per_split
from vismt.data.source_types import Card, Files, RootedSource, source_kind
from vismt.storage.files import parse_json

SPLITS = ("train", "valid", "test")
HIERARCHIES = ("superclass", "nodes")
SPEC = "dataset_spec.json"
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError)


@dataclass
class DomainSpec:
    """Numbers of a domain, from the card or dataset_spec.json.

    Attributes:
        names: of the classes, by class id.
        ranges: class ids of each split.
        images: number of images by class id, where known.
        above: superclass of each class, or empty.
        nodes: for each split, the class ids below each node of the hierarchy, or empty.
    """

    names: list[str]
    ranges: dict[str, range]
    images: dict[int, int] = field(default_factory=dict)
    above: list[str] = field(default_factory=list)
    nodes: dict[str, list[list[int]]] = field(default_factory=dict)


def ranges(classes_per_split: Mapping[str, int]) -> dict[str, range]:
    """Return the class ids of each split: consecutive, in the order train, valid, test."""
    counts = [int(classes_per_split.get(split, 0)) for split in SPLITS]
    ends = list(accumulate(counts))
    return {split: range(end - count, end) for split, count, end in zip(SPLITS, counts, ends, strict=True)}


def leaves_of_nodes(graph: list[dict[str, Any]], ids: Mapping[str, int]) -> list[list[int]]:
    """Return the class ids below each internal node of one split's graph, nodes in the file's order.

    `graph` has a mapping with `wn_id` and `children_ids` per synset; a leaf is a class, `ids` gives its id.
    """
    children = {node["wn_id"]: node["children_ids"] for node in graph}
    below: dict[str, frozenset[int]] = {}

    def leaves(name: str) -> frozenset[int]:
        if name not in below:
            under = children[name]
            below[name] = frozenset().union(*map(leaves, under)) if under else frozenset([ids[name]])
        return below[name]

    return [sorted(leaves(name)) for name, under in children.items() if under]


def _parse(raw: Mapping[str, Any]) -> DomainSpec:
    names_by_id = {int(key): str(name) for key, name in raw["class_names"].items()}
    names = [names_by_id[k] for k in range(len(names_by_id))]
    if "split_subgraphs" in raw:
        graphs = {split: raw["split_subgraphs"][split.upper()] for split in SPLITS}
        ids = {name: k for k, name in enumerate(names)}
        counts = {split: sum(not node["children_ids"] for node in graph) for split, graph in graphs.items()}
        images = {ids[n]: c for part in raw["images_per_class"].values() for n, c in part.items() if n in ids}
        nodes = {split: leaves_of_nodes(graph, ids) for split, graph in graphs.items()}
        return DomainSpec(names, ranges(counts), images, nodes=nodes)
    images = {int(key): count for key, count in raw["images_per_class"].items() if isinstance(count, int)}
    if "classes_per_superclass" not in raw:
        counts = {split: raw["classes_per_split"][split.upper()] for split in SPLITS}
        return DomainSpec(names, ranges(counts), images)
    sizes = [raw["classes_per_superclass"][str(k)] for k in range(len(raw["classes_per_superclass"]))]
    above = [raw["superclass_names"][str(k)] for k, size in enumerate(sizes) for _ in range(size)]
    groups = ranges({split: raw["superclasses_per_split"][split.upper()] for split in SPLITS})
    counts = {split: sum(sizes[k] for k in group) for split, group in groups.items()}
    return DomainSpec(names, ranges(counts), images, above)


@source_kind("meta_dataset")
@dataclass(frozen=True, kw_only=True)
class MetaDatasetSource(RootedSource, ImageSource):
    """One domain of Meta-Dataset, converted: `dataset_spec.json` beside a file for each class id, or a folder for each name.

    Attributes:
        classes_per_split: number of classes of train, valid and test, for copies without the spec.
        hierarchy: what the spec adds, 'superclass' or 'nodes'; the spec is then required.
    """

    classes_per_split: dict[str, int]
    hierarchy: str | None = None

    def check(self, where: str) -> None:
        """Raise UserError for an unknown split or hierarchy and a negative number of classes."""
        super().check(where)
        check_classes_per_split(self.splits, self.classes_per_split, SPLITS, where)
        if self.hierarchy is not None and self.hierarchy not in HIERARCHIES:
            raise UserError(f"{where}: hierarchy '{self.hierarchy}' is not known.{near(self.hierarchy, HIERARCHIES)}")

    def list_files(self, base: Path) -> Files:
        """Return the files of the classes, each as a group of its name, and the spec."""
        paths = [path for form in FORMS for path in sorted(base.glob(f"*{form}")) if path.stem.isdigit()]
        return {path.name: [(path.name, path)] for path in [*paths, base / SPEC] if path.is_file()}

    def load(self, card: Card, base: Path, split: str) -> LoadedImages:
        """Return the images of `split`; labels are the class ids of the spec, so a label means the same in each split.

        Raises:
            UserError: a class without file or folder, a file with another number of images than the spec says, a spec that
                differs from the card, a missing h5py and, where the set has a hierarchy, a missing spec.
        """
        spec = self._read_spec(card, base)
        verify_classes(card, self, base, len(spec.names))
        wanted = self.wanted(split)
        labels: list[int] = []
        parts: list[ClassImages] = []
        counts: dict[str, int] = {}
        for name in wanted:
            before = len(labels)
            for k in spec.ranges[name]:
                images = _images_of(card, base, name, spec, k)
                parts.append(images)
                labels += [k] * len(images)
            counts[name] = len(labels) - before
        verify_counts(card, self, base, counts)
        rows = [(images, number) for images in parts for number in range(len(images))]

        def read(i: int) -> Tensor:
            images, number = rows[i]
            return images.read(number)

        def content() -> str:
            # Hashing the bytes of a domain would take longer than reading it: size and times stand for them. No program sets
            # the time of the last change of a file (ctime) back, as copying and unpacking do with that of its content.
            stats = ((path.relative_to(base), path.stat()) for images in parts for path in images.paths)
            text = "\n".join(f"{path}\t{s.st_size}\t{s.st_mtime_ns}\t{s.st_ctime_ns}" for path, s in stats)
            return hashlib.sha256(text.encode()).hexdigest()

        return LoadedImages(
            classes=spec.names,
            labels=labels,
            ids=[name for images in parts for name in images.names],
            read=read,
            content=content,
            above=spec.above,
            nodes=[node for name in wanted for node in spec.nodes.get(name, [])],
        )

    def _read_spec(self, card: Card, base: Path) -> DomainSpec:
        """Return the domain's spec, or the card's numbers when the copy has none and needs no hierarchy."""
        path = base / SPEC
        if not path.is_file():
            if self.hierarchy:
                raise UserError(
                    f"{card.shown}: no '{SPEC}' under {shown_path(base)}, which holds its hierarchy ({self.hierarchy}): "
                    f"take it from google-research/meta-dataset, meta_dataset/dataset_conversion/dataset_specs. {fix(card)}"
                )
            by_split = ranges(self.classes_per_split)
            return DomainSpec([str(k) for k in range(by_split["test"].stop)], by_split)
        try:
            spec = _parse(parse_json(path.read_text(encoding="utf8")))
        except (OSError, *MALFORMED) as error:
            raise UserError(
                f"{shown_path(path)}: not a dataset_spec of Meta-Dataset ({error!r}). {fix(card)}"
            ) from error
        stated = {split: len(ids) for split, ids in spec.ranges.items() if ids}
        if stated != {split: count for split, count in self.classes_per_split.items() if count}:
            raise UserError(
                f"{shown_path(path)}: classes per split {stated}, the card says {self.classes_per_split}. {fix(card)}"
            )
        if spec.ranges["test"].stop != len(spec.names) or (spec.above and len(spec.above) != len(spec.names)):
            raise UserError(
                f"{shown_path(path)}: names {len(spec.names)} classes, its splits hold {spec.ranges['test'].stop}."
            )
        return spec


def _images_of(card: Card, base: Path, split: str, spec: DomainSpec, k: int) -> ClassImages:
    """Return the images of class `k`. Raises UserError where there are none."""
    images = open_class(card, base, _folder(base, split, spec.names[k]), k, spec.images.get(k))
    if images is None:
        files = " nor ".join(f"'{k}{form}'" for form in FORMS)
        raise UserError(
            f"{card.shown}: class {k} ('{spec.names[k]}', split '{split}') has neither {files} nor a folder of images"
            f" under {shown_path(base)}. {fix(card)}"
        )
    return images


def _folder(base: Path, split: str, name: str) -> Path | None:
    """Return the folder of the images of a class, or None."""
    safe = name.replace("/", "_")
    if safe in (".", ".."):
        return None
    return next((path for path in (base / split / safe, base / safe) if path.is_dir()), None)
