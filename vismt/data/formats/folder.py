"""Image files in class folders, whole or by split lists."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vismt.base.errors import UserError, near
from vismt.config.typed import RelativePath, relative_path
from vismt.data.copies import fix, shown_path, verify_classes, verify_counts, verify_present
from vismt.data.decode import decode_file, is_image_name
from vismt.data.image_source import ImageSource, LoadedImages
from vismt.data.manifest import digest
from vismt.data.source_types import Card, Files, RootedSource, source_kind
from vismt.storage.paths import regular_file

LAYOUTS = ("{class}", "{split}/{class}", "**/{class}", "{split}/**/{class}")
ClassFolders = dict[str, dict[Path, list[Path]]]  # split -> class folder -> its image files, sorted


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it as an image names it
        return False


def _class_folders(base: Path, deep: bool) -> list[Path]:
    """Return the sub-folders of `base`; with `deep` only those at the bottom, at any depth."""
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
    """Return the image files by class folder, named relative to `base`."""
    return {
        folder.relative_to(base).as_posix(): paths for classes in folders.values() for folder, paths in classes.items()
    }


@source_kind("folder")
@dataclass(frozen=True, kw_only=True)
class FolderSource(RootedSource, ImageSource):
    """Image files in class folders.

    Attributes:
        layout: where the class folder is: `{class}`, `{split}/{class}`, or with `**/` before `{class}` at any depth.
        lists: maps a split to a text file beside the card with one image path (relative to `root`) a line.
    """

    layout: RelativePath = "{class}"
    lists: dict[str, RelativePath] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raise UserError for an unknown layout, and for one that does not fit the splits."""
        super().check(where)
        if self.layout not in LAYOUTS:
            raise UserError(f"{where}: layout '{self.layout}' is not known.{near(self.layout, LAYOUTS)}")
        if self.lists and set(self.lists) != set(self.splits):
            names = f"'lists' names {sorted(self.lists)}, 'splits' names {sorted(self.splits)}"
            raise UserError(f"{where}: {names}; they must agree.")
        if not self.lists and "{split}" not in self.layout and list(self.splits) != ["all"]:
            raise UserError(f"{where}: layout '{self.layout}' has no {{split}}: name one split 'all', or give 'lists'.")

    def scan(self, base: Path) -> ClassFolders:
        """Return every image under `base` by split and class folder; an empty class folder has an empty list."""
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

    def load(self, card: Card, base: Path, split: str) -> LoadedImages:
        """Return the images of `split`; ids are paths relative to `base`.

        Classes are the sorted folder names over all splits, so a label means the same in each.

        Raises:
            UserError: an empty class folder, a missing split, and a count that is not the card's.
        """
        folders = self.scan(base)
        _refuse_empty(card, self.layout, base, folders)
        wanted = self.wanted(split)
        if self.lists:
            chosen = {name: self._listed(card, base, name) for name in wanted}
        else:
            absent = next((name for name in wanted if name not in folders), None)
            if absent is not None:
                raise UserError(f"{card.shown}: {shown_path(base)} has no folder for split '{absent}'. {fix(card)}")
            chosen = {name: [path for paths in folders[name].values() for path in paths] for name in wanted}
        groups = {name: len(paths) for name, paths in _groups(folders, base).items()}
        verify_counts(card, self, base, {name: len(paths) for name, paths in chosen.items()}, groups)
        classes = sorted({folder.name for by_class in folders.values() for folder in by_class})
        verify_classes(card, self, base, len(classes))
        index = {name: label for label, name in enumerate(classes)}
        paths = [path for name in wanted for path in chosen[name]]
        ids = [path.relative_to(base).as_posix() for path in paths]
        return LoadedImages(
            classes=classes,
            labels=[index[path.parent.name] for path in paths],
            ids=ids,
            read=lambda i: decode_file(paths[i]),
            content=lambda: digest(zip(ids, paths)).sha256,
        )

    def _listed(self, card: Card, base: Path, split: str) -> list[Path]:
        """Return the files that the split list names, in its order, without blank lines and lines with #."""
        name = self.lists[split]
        try:
            lines = regular_file(card.folder / name).read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{card.shown}: missing split file '{name}' beside the card ({error}). {fix(card)}"
            ) from error
        where = f"{card.shown}/{name}"
        entries = [relative_path(line.strip(), where) for line in lines if line.strip() and line[0] != "#"]
        return verify_present(card, base, entries, split)


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
