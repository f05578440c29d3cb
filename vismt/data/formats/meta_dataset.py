"""Domains of Meta-Dataset (Triantafillou et al., arXiv 1903.03096), in the form that its own conversion leaves.

A class with the number k is the file `k.tfrecords`, one tf.train.Example for each image, with `image` (JPEG or PNG) and `label`
(k). `dataset_spec.json` numbers the classes: first the classes of the training split, then validation, then test. It also holds
what the episodes draw from: Omniglot's alphabets, and ImageNet's part of WordNet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from torch import Tensor

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.typed import Names, within
from vismt.data.copies import fix, shown_path
from vismt.data.decode import decode_bytes
from vismt.data.formats.tfrecords import read_example, scan
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import MOST_CLASSES, Card, Files, RootedSource, source_kind
from vismt.storage.files import JsonObject, parse_json

_SPLITS = ("train", "valid", "test")
HIERARCHIES = ("superclass", "nodes")
SPEC = "dataset_spec.json"
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError)


@dataclass
class DomainSpec:
    """Numbers of a domain, from the card or dataset_spec.json.

    Attributes:
        names: Names of the classes, by class id.
        ranges: Class ids of each split.
        images: Number of images by class id, if known.
        above: Superclass of each class, or empty.
        nodes: Class ids below each node of the hierarchy, for each split, or empty.
    """

    names: list[str]
    ranges: dict[str, range]
    images: dict[int, int] = field(default_factory=dict)
    above: list[str] = field(default_factory=list)
    nodes: dict[str, list[list[int]]] = field(default_factory=dict)


def ranges(classes_per_split: Mapping[str, int]) -> dict[str, range]:
    """Return the class ids of each split: consecutive, in the order train, valid, test."""
    counts = [int(classes_per_split.get(split, 0)) for split in _SPLITS]
    ends = list(accumulate(counts))
    return {split: range(end - count, end) for split, count, end in zip(_SPLITS, counts, ends, strict=True)}


def leaves_of_nodes(graph: list[JsonObject], ids: Mapping[str, int]) -> list[list[int]]:
    """Return the class ids below each internal node of one split's graph, with nodes in the file's order.

    `graph` has a mapping with `wn_id` and `children_ids` for each synset. A leaf is a class, and `ids` gives its id.
    """
    children = {node["wn_id"]: node["children_ids"] for node in graph}
    below: dict[str, frozenset[int]] = {}

    def leaves(name: str) -> frozenset[int]:
        if name not in below:
            under = children[name]
            below[name] = frozenset().union(*map(leaves, under)) if under else frozenset([ids[name]])
        return below[name]

    return [sorted(leaves(name)) for name, under in children.items() if under]


def _parse(raw: JsonObject) -> DomainSpec:
    names_by_id = {int(key): str(name) for key, name in raw["class_names"].items()}
    names = [names_by_id[k] for k in range(len(names_by_id))]
    if "split_subgraphs" in raw:
        graphs = {split: raw["split_subgraphs"][split.upper()] for split in _SPLITS}
        ids = {name: k for k, name in enumerate(names)}
        counts = {split: sum(not node["children_ids"] for node in graph) for split, graph in graphs.items()}
        images = {ids[n]: c for part in raw["images_per_class"].values() for n, c in part.items() if n in ids}
        nodes = {split: leaves_of_nodes(graph, ids) for split, graph in graphs.items()}
        return DomainSpec(names, ranges(counts), images, nodes=nodes)
    images = {int(key): count for key, count in raw["images_per_class"].items() if isinstance(count, int)}
    if "classes_per_superclass" not in raw:
        counts = {split: raw["classes_per_split"][split.upper()] for split in _SPLITS}
        return DomainSpec(names, ranges(counts), images)
    sizes = [raw["classes_per_superclass"][str(k)] for k in range(len(raw["classes_per_superclass"]))]
    above = [raw["superclass_names"][str(k)] for k, size in enumerate(sizes) for _ in range(size)]
    groups = ranges({split: raw["superclasses_per_split"][split.upper()] for split in _SPLITS})
    counts = {split: sum(sizes[k] for k in group) for split, group in groups.items()}
    return DomainSpec(names, ranges(counts), images, above)


@source_kind("meta_dataset")
@dataclass(frozen=True, kw_only=True)
class MetaDatasetSource(RootedSource, ImageSource):
    """One domain of Meta-Dataset, converted: `dataset_spec.json` beside a file of records for each class id.

    Attributes:
        classes_per_split: Numbers of classes of train, valid and test, for copies without the spec.
        hierarchy: Part that the spec adds, "superclass" or "nodes". The spec is then required.
    """

    classes_per_split: dict[str, Annotated[int, within(0, MOST_CLASSES)]]
    hierarchy: Annotated[str, Names(HIERARCHIES, only=True)] | None = None

    def check(self, where: str) -> None:
        super().check(where)
        require_known(f"{where}: no split", (*self.splits, *self.classes_per_split), _SPLITS)

    def list_files(self, base: Path) -> Files:
        """Return the files of the classes, each as a group of its name, and the spec."""
        paths = [path for path in sorted(base.glob("*.tfrecords")) if path.stem.isdigit()]
        return {path.name: [(path.name, path)] for path in [*paths, base / SPEC] if path.is_file()}

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images of the records. Labels are the class ids of the spec."""
        spec = self._read_spec(card, base)
        files: dict[int, Path] = {}
        positions: dict[int, array[int]] = {}  # positions of the records in the file of a class
        rows: dict[str, list[ImageRow]] = {split: [] for split in splits}
        for split in splits:
            for k in spec.ranges[split]:
                path = files[k] = base / f"{k}.tfrecords"
                if not path.is_file():
                    raise UserError(
                        f"{card.shown}: class {k} ('{spec.names[k]}', split '{split}') has no file '{path.name}' under "
                        f"{shown_path(base)}. {fix(card)}"
                    )
                positions[k] = scan(path)
                count, expected = len(positions[k]), spec.images.get(k)
                if count != (expected or max(count, 1)):
                    raise UserError(f"{shown_path(path)}: holds {count:,} of {expected or 1:,} images. {fix(card)}")
                rows[split] += [ImageRow(f"{path.name}/{number}", k, (k, number)) for number in range(count)]

        def read(place: tuple[int, int]) -> Tensor:
            k, number = place
            return _read_record(files[k], positions[k][number], number, k)

        def content() -> str:
            # Hashing the bytes of a domain would take longer than reading it, so size and times stand for them. No
            # program resets the time of the last change of a file (ctime). Copying and unpacking do reset the time
            # of the last change of its content.
            stats = ((path.relative_to(base), path.stat()) for path in files.values())
            text = "\n".join(f"{path}\t{s.st_size}\t{s.st_mtime_ns}\t{s.st_ctime_ns}" for path, s in stats)
            return hashlib.sha256(text.encode()).hexdigest()

        nodes = [node for split in splits for node in spec.nodes.get(split, [])]
        return Listing(spec.names, rows, read, content, above=spec.above, nodes=nodes, timed=True)

    def _read_spec(self, card: Card, base: Path) -> DomainSpec:
        """Return the domain's spec, or the card's numbers if the copy has none and needs no hierarchy."""
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
                f"{shown_path(path)}: not a dataset_spec of Meta-Dataset ({shown_value(error)}). {fix(card)}"
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


def _read_record(path: Path, position: int, number: int, label: int) -> Tensor:
    features = read_example(path, position, number)
    shown = f"{shown_path(path)}: record {number}"
    for name, kind in (("image", bytes), ("label", int)):
        values = features.get(name, [])
        if len(values) != 1 or not isinstance(values[0], kind):
            held = ", ".join(f"'{key}'" for key in features) or "nothing"
            raise UserError(f"{shown}: needs one '{name}' of type {kind.__name__}; its features are {held}.")
    if features["label"] != [label]:
        raise UserError(
            f"{shown}: has label {shown_value(features['label'][0])}, its file is for class {label}. Convert it again."
        )
    return decode_bytes(bytes(features["image"][0]), shown)
