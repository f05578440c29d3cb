"""Which files of a dense set belong together: the paths of a source filled in, matched by the id in the file name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vismt.data.cards import Card
from vismt.data.decode import SUFFIXES
from vismt.data.source_types import DenseSource
from vismt.data.sources import fix, shown_path
from vismt.errors import UserError

READABLE = SUFFIXES | {".npy", ".mat"}


def _fill(path: str, split: str, group: str) -> tuple[str, str, str]:
    """Folder, and what stands before and after the id in the names of its files."""
    path = path.replace("{split}", split).replace("{group}", group)
    folder, _, name = (path if "{id}" in path else f"{path}/{{id}}").rpartition("/")
    before, _, after = name.partition("{id}")
    return folder, before, after


def _paths(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _in_folder(folder: Path, before: str = "", after: str = "") -> dict[str, Path]:
    """Id -> file of a folder, sorted; UserError for an id with two files. Empty when there is no such folder."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.stem
        if path.suffix.lower() not in READABLE or path.name.startswith(".") or len(name) <= len(before) + len(after):
            continue
        if name.startswith(before) and name.endswith(after):
            key = name[len(before) : len(name) - len(after)]
            if key in found:
                raise UserError(f"{shown_path(path)}: '{found[key].name}' has the same id. Remove one of them.")
            found[key] = path
    return found


def _find(base: Path, value: str | list[str], split: str, group: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _paths(value):
        folder, before, after = _fill(path, split, group)
        found = _in_folder(base / folder, before, after) | found
    return found


def _lines(card: Card, base: Path, name: str) -> list[str]:
    try:
        lines = [line.strip() for line in (base / name).read_text(encoding="utf8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{card.shown}: the list {shown_path(base / name)} cannot be read: {error}. {fix(card)}"
        ) from error
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{card.shown}: the list {shown_path(base / name)} is empty. {fix(card)}")
    return found


def _listed(card: Card, source: DenseSource, base: Path, split: str) -> Iterator[tuple[str, list[str] | None]]:
    """(group, its listed ids or None for every image) of a split."""
    lines = _lines(card, base, source.listed.replace("{split}", split)) if source.listed else None
    if "{group}" not in source.image:
        yield "", lines
    else:
        for group in lines if lines is not None else sorted(path.name for path in base.iterdir() if path.is_dir()):
            yield group, None


def pairs(card: Card, source: DenseSource, base: Path, split: str) -> list[dict[str, Path]]:
    """One dict a sample: `image` and the maps it has, in the order of the list or of the names.

    Raises UserError naming the id and the folder for an image without one of its maps (unless the source is `partial`), a
    listed id without image, an unlisted map without image, and a list that cannot be read.
    """
    out: list[dict[str, Path]] = []
    for group, ids in _listed(card, source, base, split):
        images = _find(base, source.image, split, group)
        maps = {name: _find(base, value, split, group) for name, value in source.maps.items()}
        wanted = list(images) if ids is None else ids
        lost = [(key, "image", source.image) for key in wanted if key not in images]
        for name, value in source.maps.items():
            if not source.partial:
                lost += [(key, name, value) for key in wanted if key not in maps[name]]
                lost += [
                    (key, "image", source.image) for key in sorted(maps[name].keys() - images.keys()) if ids is None
                ]
        if lost:
            key, name, value = lost[0]
            folders = " or ".join(shown_path(base / _fill(path, split, group)[0]) for path in _paths(value))
            raise UserError(f"{card.shown}: '{key}' of split '{split}' has no {name} file under {folders}. {fix(card)}")
        out += [{"image": images[key], **{n: m[key] for n, m in maps.items() if key in m}} for key in wanted]
    return out


def count(source: DenseSource, base: Path, split: str) -> int:
    """How many images of a damaged copy are there for `split`, listed or not."""
    groups = [path.name for path in base.iterdir() if path.is_dir()] if "{group}" in source.image else [""]
    return sum(
        len(_in_folder(base / folder, *name)) for folder, *name in (_fill(source.image, split, g) for g in groups)
    )


def files(source: DenseSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """Every list, image and map file, one group a folder (`train/label`) or list, for the manifest."""
    groups = sorted(path.name for path in base.iterdir() if path.is_dir()) if "{group}" in source.image else [""]
    out: dict[str, list[tuple[str, Path]]] = {}
    for split in source.splits:
        if source.listed:
            name = source.listed.replace("{split}", split)
            out[name] = [(name, base / name)] if (base / name).is_file() else []
        for path in [source.image, *(p for value in source.maps.values() for p in _paths(value))]:
            for folder in dict.fromkeys(_fill(path, split, group)[0] for group in groups):
                out[folder] = [(f"{folder}/{file.name}", file) for file in _in_folder(base / folder).values()]
    return out
