"""Images and maps in files that belong together by the id in their names. Paths have placeholders, which are filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from vismt.base.errors import UserError, near
from vismt.config.typed import RelativePath, within
from vismt.data.copies import digest_files, fix, read_text, shown_path, verify_counts
from vismt.data.decode import IMAGE_SUFFIXES
from vismt.data.formats.pascal_context import PARTS
from vismt.data.image_set import readable_names
from vismt.data.maps.dense_maps import MAP_FORMS, MapSettings, read_maps
from vismt.data.maps.dense_sample import IGNORE, MAPS
from vismt.data.maps.dense_set import DenseSet, DenseSource, check_camera
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind

READABLE = IMAGE_SUFFIXES | {".npy", ".mat"}
PLACEHOLDERS = ("split", "group", "id")
DERIVED = {"normals": ("depth",), "edge": ("semseg", "depth")}  # target -> what it can be computed from


@source_kind("dense")
@dataclass(frozen=True, kw_only=True)
class DenseFilesSource(RootedSource, DenseSource):
    """Images with per-pixel maps.

    `image` and the values of `maps` are paths without suffix. `{split}` and `{group}` name folders, and `{id}` names the image
    in the file name. A path without {id} is a folder of such files. A list of paths is searched in order.

    Attributes:
        image: Path of the images.
        maps: Paths of the maps. Their names say what the files hold (MAP_FORMS in dense_maps.py).
        void: Label of no class.
        first: Label of class 0.
        listed: Text file with one id a line, or one group a line if `image` has {group}.
        partial: Whether a sample may lack targets whose file is missing. Otherwise a missing file is an error.
        edge_above: Share of the largest value from which a pixel is an edge. In npy files it is the value itself.
        axes: Signs that turn stored normals to x right, y up, z towards the camera.
        derive: Targets that the set lacks, each with the target that it is computed from ({edge: semseg}). Edges are computed
            at the size they are used in, normals at the size of the stored maps.
        camera: Values fx, fy, cx, cy in pixels, for derived normals.
        normal_classes: JSON file beside the card, see pascal_context.py.
    """

    image: RelativePath
    maps: dict[str, RelativePath | list[RelativePath]]
    void: int | None = None
    first: int = 0
    listed: RelativePath | None = None
    partial: bool = False
    edge_above: Annotated[float, within(0)] = 0.5
    axes: list[int] = field(default_factory=lambda: [1, 1, 1])
    derive: dict[str, str] = field(default_factory=dict)
    camera: dict[str, float] = field(default_factory=dict)
    normal_classes: RelativePath | None = None

    @property
    def inverse_depth(self) -> bool:
        return "inverse_depth" in self.maps

    def check(self, where: str) -> None:
        super().check(where)
        unknown = next((name for name in self.maps if name not in MAP_FORMS), None)
        if unknown is not None:
            raise UserError(f"{where}: map '{unknown}' is not known.{near(unknown, MAP_FORMS)}")
        targets = [MAP_FORMS[name].target for name in self.maps]
        if len(set(targets)) < len(targets):
            raise UserError(f"{where}: the maps {list(self.maps)} become {targets}; each target once.")
        self._check_paths(where)
        self._check_derived(targets, where)
        if len(self.axes) != 3 or set(self.axes) - {1, -1}:
            raise UserError(f"{where}: axes {self.axes} must be three signs, 1 or -1.")

    def _check_paths(self, where: str) -> None:
        for path in (self.image, *(path for value in self.maps.values() for path in _paths(value))):
            unknown = [name for name in re.findall(r"{(.*?)}", path) if name not in PLACEHOLDERS]
            if unknown or "{id}" in path.rpartition("/")[0] or path.count("{id}") > 1:
                raise UserError(
                    f"{where}: '{path}' may hold {{split}} and {{group}}, and {{id}} once, in the file name."
                )
        if len(self.splits) > 1 and "{split}" not in self.image + (self.listed or ""):
            raise UserError(
                f"{where}: image '{self.image}' has no {{split}}: name one split 'all', or give 'listed' with {{split}}."
            )

    def _check_derived(self, targets: list[str], where: str) -> None:
        for target, origin in self.derive.items():
            if origin not in DERIVED.get(target, ()) or origin not in targets or target in targets:
                choices = ", ".join(f"{name} from {source}" for name, sources in DERIVED.items() for source in sources)
                raise UserError(
                    f"{where}: cannot derive {target} from {origin} of {targets} (known: {choices}; a stored target is read)."
                )
        if self.inverse_depth and "depth" in self.derive.values():
            raise UserError(f"{where}: nothing is derived from inverse_depth, which has no scale.")
        if "normals" in self.derive:
            check_camera(self.camera, where)

    def list_files(self, base: Path) -> Files:
        """Return every list, image and map file, with one group for each folder (`train/label`) or list."""
        groups: dict[str, list[tuple[str, Path]]] = {}
        paths = [self.image, *(path for value in self.maps.values() for path in _paths(value))]
        for split in self.splits:
            if self.listed:
                groups |= {name: list(files) for name, files in file_groups(base, [self._list_of(split)]).items()}
            for path in paths:
                for folder in dict.fromkeys(_fill(path, split, group)[0] for group in self._groups(base)):
                    entries = _in_folder(base / folder).values()
                    groups[folder] = [(f"{folder}/{file.name}", file) for file in entries]
        return groups

    def count_images(self, base: Path, split: str) -> int:
        places = (_fill(self.image, split, group) for group in self._groups(base))
        return sum(len(_in_folder(base / folder, before, after)) for folder, before, after in places)

    def load(self, card: Card, base: Path, split: str) -> DenseSet:
        """Return the samples of `split`. Ids are the image's path inside the set."""
        parts = {name: self.pairs(card, base, name) for name in self.wanted(split)}
        verify_counts(card, self, base, {name: len(pairs) for name, pairs in parts.items()})
        paths = [pair for pairs in parts.values() for pair in pairs]
        if not paths:
            raise UserError(f"{card.shown}: no image of split '{split}' found under {shown_path(base)}.")
        count = self.classes or card.classes
        if "label" in self.maps and count > IGNORE:
            raise UserError(
                f"{card.shown}: {count} classes; a label map may have {IGNORE}, as {IGNORE} marks pixels without a label."
            )
        classes = readable_names(card, [str(label) for label in range(count)])
        normal_classes = card.read_mapping(self.normal_classes, "class to number", int) if self.normal_classes else {}
        camera = self.camera if "normals" in self.derive else {}
        settings = MapSettings(len(classes), self.void, self.first, self.edge_above, self.axes, normal_classes, camera)
        targets = {MAP_FORMS[name].target for pair in paths for name in pair if name != "image"}
        targets |= {target for target, origin in self.derive.items() if origin in targets}

        def content(i: int) -> str:
            files = [(path.relative_to(base).as_posix(), path) for path in paths[i].values()]
            return f"{digest_files(files).sha256}:{settings}:{self.derive}"

        return DenseSet(
            name=card.name,
            split=split,
            classes=classes,
            targets=[target for target in MAPS if target in targets],
            ids=[pair["image"].relative_to(base).as_posix() for pair in paths],
            stored=lambda i: read_maps(paths[i], settings),
            content=content,
            file=lambda i: paths[i]["image"],
            parts=list(PARTS) if "parts" in targets else [],
            inverse_depth=self.inverse_depth,
            where=shown_path(base),
            edges=self.derive.get("edge"),
        )

    def pairs(self, card: Card, base: Path, split: str) -> list[dict[str, Path]]:
        """Return one dictionary for each sample: `image` and the maps it has, in the order of the list or of the names."""
        samples: list[dict[str, Path]] = []
        lines = _lines(card, base, self._list_of(split)) if self.listed else None
        listed: list[tuple[str, list[str] | None]]
        if "{group}" in self.image:  # the list is a list of groups
            listed = [(group, None) for group in (self._groups(base) if lines is None else lines)]
        else:
            listed = [("", lines)]
        for group, ids in listed:
            images = _find(base, self.image, split, group)
            maps = {name: _find(base, value, split, group) for name, value in self.maps.items()}
            wanted = list(images) if ids is None else ids
            missing = self._missing(wanted, images, maps, ids is None)
            if missing:
                key, name = missing[0]
                value = self.image if name == "image" else self.maps[name]
                count = sum(other == name for _, other in missing)
                more = f", nor have {count - 1:,} others" if count > 1 else ""
                remedy = "" if name == "image" else "If images may lack it, set partial: true in the source. "
                folders = " or ".join(shown_path(base / _fill(path, split, group)[0]) for path in _paths(value))
                raise UserError(
                    f"{card.shown}: '{key}' of split '{split}' has no {name} file under {folders}{more}. {remedy}{fix(card)}"
                )
            for key in wanted:
                present = {name: files[key] for name, files in maps.items() if key in files}
                samples.append({"image": images[key], **present})
        return samples

    def _missing(
        self, wanted: list[str], images: dict[str, Path], maps: dict[str, dict[str, Path]], unlisted: bool
    ) -> list[tuple[str, str]]:
        """Return (id, "image" or name of the map) of the files that are missing."""
        missing = [(key, "image") for key in wanted if key not in images]
        if self.partial:
            return missing
        for name, files in maps.items():
            missing += [(key, name) for key in wanted if key not in files]
            if unlisted:
                missing += [(key, "image") for key in sorted(files.keys() - images.keys())]
        return missing

    def _list_of(self, split: str) -> str:
        return (self.listed or "").replace("{split}", split)

    def _groups(self, base: Path) -> list[str]:
        return sorted(path.name for path in base.iterdir() if path.is_dir()) if "{group}" in self.image else [""]


def _fill(path: str, split: str, group: str) -> tuple[str, str, str]:
    """Return the folder, and the text before and after the id in the names of its files."""
    path = path.replace("{split}", split).replace("{group}", group)
    folder, _, name = (path if "{id}" in path else f"{path}/{{id}}").rpartition("/")
    before, _, after = name.partition("{id}")
    return folder, before, after


def _paths(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _in_folder(folder: Path, before: str = "", after: str = "") -> dict[str, Path]:
    """Return {id: file} of a folder, sorted. A missing folder is empty. Raise UserError for an id with two files."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.stem
        if path.suffix.lower() not in READABLE or path.name.startswith(".") or len(name) <= len(before) + len(after):
            continue
        if name.startswith(before) and name.endswith(after):
            key = name[len(before) : len(name) - len(after)]
            if key in files:
                raise UserError(f"{shown_path(path)}: '{files[key].name}' has the same id. Remove one of them.")
            files[key] = path
    return files


def _find(base: Path, value: str | list[str], split: str, group: str) -> dict[str, Path]:
    """Return {id: file} of an image or map. The first path that has an id gives its file."""
    files: dict[str, Path] = {}
    for path in _paths(value):
        folder, before, after = _fill(path, split, group)
        files = _in_folder(base / folder, before, after) | files
    return files


def _lines(card: Card, base: Path, name: str) -> list[str]:
    lines = read_text(card, base / name, "utf8", what="list").splitlines()
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise UserError(f"{card.shown}: the list {shown_path(base / name)} is empty. {fix(card)}")
    return entries
