"""Image files in class folders, whole or by split lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from vismt.base.errors import UserError
from vismt.config.typed import Names, RelativePath, relative_path
from vismt.data.copies import digest_files, fix, shown_path
from vismt.data.decode import is_image_name
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import Card, Files, RootedSource, source_kind
from vismt.storage.paths import regular_file

CLASS_FOLDERS = ("{class}", "{split}/{class}", "**/{class}", "{split}/**/{class}")
ClassFolders = dict[str, dict[Path, list[Path]]]  # split -> class folder -> its image files, sorted


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which reading it as an image names
        return False


def _class_folders(base: Path, deep: bool) -> list[Path]:
    """Return the sub-folders of `base`. With `deep`, return only the folders at the bottom, at any depth."""
    if not deep:
        return sorted(Path(entry.path) for entry in os.scandir(base) if _is_folder(entry) and not _hidden(entry.name))
    bottom = []
    for current, folders, _ in os.walk(base):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        if not folders:
            bottom.append(Path(current))
    return sorted(bottom)


def _images(folder: Path) -> list[Path]:
    names = (entry.name for entry in os.scandir(folder) if is_image_name(entry.name) and not _is_folder(entry))
    return [folder / name for name in sorted(names)]


def _groups(folders: ClassFolders, base: Path) -> dict[str, list[Path]]:
    return {
        folder.relative_to(base).as_posix(): paths for classes in folders.values() for folder, paths in classes.items()
    }


@source_kind("folder")
@dataclass(frozen=True, kw_only=True)
class FolderSource(RootedSource, ImageSource):
    """Image files in class folders.

    Attributes:
        layout: Place of the class folder: `{class}`, `{split}/{class}`, or with `**/` before `{class}` at any depth.
        lists: Text file beside the card for each split, with one image path (relative to `root`) a line.
    """

    layout: Annotated[str, Names(CLASS_FOLDERS, only=True)] = "{class}"
    lists: dict[str, RelativePath] = field(default_factory=dict)

    def check(self, where: str) -> None:
        super().check(where)
        if self.lists:
            self.check_per_split(where, "lists", self.lists)
        if not self.lists and "{split}" not in self.layout and list(self.splits) != ["all"]:
            raise UserError(f"{where}: layout '{self.layout}' has no {{split}}: name one split 'all', or give 'lists'.")

    def scan(self, base: Path) -> ClassFolders:
        """Return every image under `base` by split and class folder. An empty class folder has an empty list."""
        deep = "**" in self.layout
        if "{split}" in self.layout:
            folders = {split: base / split for split in self.splits if (base / split).is_dir()}
        else:
            folders = {"all": base}
        return {
            split: {path: _images(path) for path in _class_folders(folder, deep)} for split, folder in folders.items()
        }

    def list_files(self, base: Path) -> Files:
        """Return the image files in groups named by class folder (`train/apple`)."""
        groups = _groups(self.scan(base), base)
        return {name: [(path.relative_to(base).as_posix(), path) for path in paths] for name, paths in groups.items()}

    def count_images(self, base: Path, split: str) -> int:
        by_split = "{split}" in self.layout
        groups = self.list_files(base).items()
        return sum(len(paths) for group, paths in groups if not by_split or group.split("/")[0] == split)

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images of the class folders. Ids are paths relative to `base`.

        Classes are the sorted folder names over all splits, so a label means the same in each split.
        """
        folders = self.scan(base)
        _refuse_empty(card, self.layout, base, folders)
        _refuse_repeated(card, base, folders)
        classes = sorted({folder.name for by_class in folders.values() for folder in by_class})
        number = {name: label for label, name in enumerate(classes)}
        rows: dict[str, list[ImageRow]] = {}
        for split in splits:
            if self.lists:
                names = self._read_list(card, split)
                outside = next((name for name in names if Path(name).parent.name not in number), None)
                if outside is not None:
                    raise UserError(f"{card.shown}/{self.lists[split]}: '{outside}' is in no class folder. {fix(card)}")
                rows[split] = [ImageRow(name, number[Path(name).parent.name]) for name in names]
                continue
            if split not in folders:
                raise UserError(f"{card.shown}: {shown_path(base)} has no folder for split '{split}'. {fix(card)}")
            rows[split] = [
                ImageRow(path.relative_to(base).as_posix(), number[folder.name], path)
                for folder, paths in folders[split].items()
                for path in paths
            ]
        hashed = [(row.name, base / row.name) for part in rows.values() for row in part]
        files = {name: len(paths) for name, paths in _groups(folders, base).items()}
        # The labels are in the names of the files.
        return Listing(classes, rows, content=lambda: digest_files(hashed).sha256, files=files)

    def _read_list(self, card: Card, split: str) -> list[str]:
        """Return the names of files in the split list, in its order, without blank lines and lines with #."""
        name = self.lists[split]
        try:
            lines = regular_file(card.folder / name).read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{card.shown}: missing split file '{name}' beside the card ({error}). {fix(card)}"
            ) from error
        where = f"{card.shown}/{name}"
        return [relative_path(line.strip(), where) for line in lines if line.strip() and line[0] != "#"]


def _refuse_repeated(card: Card, base: Path, folders: ClassFolders) -> None:
    """Raise UserError for class folders of one name at several places.

    They may hold one class, or different classes (the characters of different alphabets).
    """
    for classes in folders.values():
        seen: dict[str, Path] = {}
        for folder in classes:
            other = seen.setdefault(folder.name, folder)
            if other != folder:
                first, second = (path.relative_to(base).as_posix() for path in (other, folder))
                raise UserError(
                    f"{card.shown}: the class folders '{first}' and '{second}' under {shown_path(base)} have the same name; "
                    "rename them if they are different classes, else put their images into one folder."
                )


def _refuse_empty(card: Card, layout: str, base: Path, folders: ClassFolders) -> None:
    if not any(folders.values()):
        raise UserError(f"{card.shown}: no class folder under {shown_path(base)} (layout '{layout}'). {fix(card)}")
    for classes in folders.values():
        for folder, paths in classes.items():
            if not paths:
                nested = any(_is_folder(entry) for entry in os.scandir(folder))
                hint = f"it holds folders: is the layout '{{split}}/{{class}}' instead of '{layout}'?"
                raise UserError(
                    f"{card.shown}: class folder '{shown_path(folder)}' holds no image; "
                    + (hint if nested else "remove the folder or put its images there.")
                )
