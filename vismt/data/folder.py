"""Image files in class folders, whole or by split lists."""

from __future__ import annotations

import os
from pathlib import Path

from vismt.data.cards import Card
from vismt.data.decode import decode_file, is_image_name
from vismt.data.manifest import digest
from vismt.data.source_types import FolderSource
from vismt.data.sources import Loaded, fix, shown_path, verify_classes, verify_counts, verify_present
from vismt.data.typed_yaml import inside
from vismt.errors import UserError

Found = dict[str, dict[Path, list[Path]]]  # split -> class folder -> its image files, sorted


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _class_folders(base: Path, deep: bool) -> list[Path]:
    """Sub-folders of `base`; with `deep` only those at the bottom, however deep."""
    if not deep:
        return sorted(Path(entry.path) for entry in os.scandir(base) if entry.is_dir() and not _hidden(entry.name))
    bottom = []
    for current, folders, _ in os.walk(base):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        if not folders:
            bottom.append(Path(current))
    return sorted(bottom)


def _images(folder: Path) -> list[Path]:
    paths = (Path(entry.path) for entry in os.scandir(folder) if not entry.is_dir())
    return sorted(path for path in paths if is_image_name(path))


def scan(source: FolderSource, base: Path) -> Found:
    """Every image under `base` by split and class folder; an empty class folder stays in with an empty list."""
    deep = "**" in source.layout
    if "{split}" in source.layout:
        folders = {split: base / split for split in source.splits if (base / split).is_dir()}
    else:
        folders = {"all": base}
    return {split: {c: _images(c) for c in _class_folders(folder, deep)} for split, folder in folders.items()}


def files(source: FolderSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The image files in groups named by class folder (`train/apple`), for the manifest."""
    return {
        folder.relative_to(base).as_posix(): [(path.relative_to(base).as_posix(), path) for path in paths]
        for classes in scan(source, base).values()
        for folder, paths in classes.items()
    }


def _listed(card: Card, source: FolderSource, base: Path, split: str) -> list[Path]:
    """The files that the split list names, in its order; blank lines and lines with # are left out."""
    name = source.lists[split]
    try:
        lines = (card.folder / name).read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{card.shown}: missing split file '{name}' beside the card ({error}). {fix(card)}") from error
    entries = [inside(line.strip(), f"{card.shown}/{name}") for line in lines if line.strip() and line[0] != "#"]
    return verify_present(card, base, entries, split)


def _refuse_empty(card: Card, source: FolderSource, base: Path, found: Found) -> None:
    if not any(found.values()):
        raise UserError(
            f"{card.shown}: no class folder under {shown_path(base)} (layout '{source.layout}'). {fix(card)}"
        )
    for classes in found.values():
        for folder, paths in classes.items():
            if not paths:
                nested = any(entry.is_dir() for entry in os.scandir(folder))
                hint = f"it holds folders: is the layout '{{split}}/{{class}}' instead of '{source.layout}'?"
                raise UserError(
                    f"{card.shown}: class folder '{shown_path(folder)}' holds no image; "
                    + (hint if nested else "remove the folder or put its images there.")
                )


def load(card: Card, source: FolderSource, base: Path, split: str) -> Loaded:
    """The images of `split` ('all' = every split); ids are paths relative to `base`.

    Classes are the sorted folder names over all splits, so a label means the same in each.
    Raises UserError for an empty class folder, a missing split and a count that is not the card's.
    """
    found = scan(source, base)
    _refuse_empty(card, source, base, found)
    wanted = list(source.splits) if split == "all" else [split]
    if source.lists:
        chosen = {name: _listed(card, source, base, name) for name in wanted}
    else:
        absent = next((name for name in wanted if name not in found), None)
        if absent is not None:
            raise UserError(f"{card.shown}: {shown_path(base)} has no folder for split '{absent}'. {fix(card)}")
        chosen = {name: [path for paths in found[name].values() for path in paths] for name in wanted}
    groups = {name: len(entries) for name, entries in files(source, base).items()}
    verify_counts(card, source, base, {name: len(paths) for name, paths in chosen.items()}, groups)
    classes = sorted({folder.name for group in found.values() for folder in group})
    verify_classes(card, source, base, len(classes))
    index = {name: label for label, name in enumerate(classes)}
    paths = [path for name in wanted for path in chosen[name]]
    ids = [path.relative_to(base).as_posix() for path in paths]
    return Loaded(
        classes=classes,
        labels=[index[path.parent.name] for path in paths],
        ids=ids,
        read=lambda i: decode_file(paths[i]),
        content=lambda: digest(zip(ids, paths)).sha256,
    )
