"""Copies of sets on this machine: where they are, how messages name them, and whether they hold what their card says.

A manifest beside a card has one sha256 for each group of files (a class folder, an npz, a photograph), so that a check can name
the wrong group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.yaml_text import read_yaml
from vismt.data.decode import read_image_bytes
from vismt.data.set_entries import CARDS
from vismt.data.source_types import PACKAGES, Card, DataSource, Files, S, check_names
from vismt.storage.files import atomic_write
from vismt.storage.paths import cache_root, data_roots, regular_file

# file in the folder of a copy that is meant to be a part of the set: {split: number of examples}
SUBSET = "subset.yaml"


def sources_for(card: Card, family: type[S], split: str) -> list[S]:
    """Return the sources of `family` that have `split`. Raise UserError for a card of another family and an unknown split."""
    sources = card.sources_of(family)
    if not sources:
        other = card.sources[0]
        raise UserError(f"{card.shown}: is a set of {other.family} (kind {other.kind}); open it with {other.opener}.")
    require_known(f"{card.shown}: no split", [split], dict.fromkeys([*card.splits, "all"]))
    return [source for source in sources if split == "all" or split in source.splits]


def first_copy(card: Card, sources: Sequence[S]) -> tuple[S, Path] | None:
    """Return the first of the sources that has a copy on this machine, with the copy's folder, or None."""
    copies = ((source, find_copy(card, source)) for source in sources)
    return next(((_as_stated(card, source, base), base) for source, base in copies if base is not None), None)


def found_copy(card: Card, family: type[S], split: str) -> tuple[S, Path]:
    """Return the first source of `family` with `split` that is on this machine, with the copy's folder.

    Raise if there is none.
    """
    copy = first_copy(card, sources_for(card, family, split))
    if copy is None:
        raise not_found(card, split)
    return copy


def _as_stated(card: Card, source: S, base: Path) -> S:
    """Return a source with the counts of the subset.yaml of its copy, without hashes. Other sources are unchanged."""
    path = base / SUBSET
    if not path.is_file():
        return source
    where = f"{card.shown}: '{shown_path(path)}'"
    stated = read_yaml(path, where)
    for split, count in stated.items():
        require_known(f"{where}: no split", [split], source.splits)
        whole = source.splits[split]
        if type(count) is not int or not 1 <= count <= (count if whole is None else whole):
            most = "" if whole is None else f" and at most {whole:,}"
            raise UserError(
                f"{where}: {split}: {shown_value(count)}; give the number of {source.unit}, at least 1{most}."
            )
    return replace(source, splits={**source.splits, **stated}, manifest=None)


def find_copy(card: Card, source: DataSource) -> Path | None:
    """Return the first candidate folder that exists and is not empty, or None."""
    for folder in source.candidates(card):
        try:
            if folder.is_dir() and any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(f"{card.shown}: folder '{shown_path(folder)}' cannot be read: {error.strerror}.") from error
    return None


def shown_path(path: Path) -> str:
    """Return `path` as messages name it: relative to $VISMT_DATA or $VISMT_CACHE if it is inside."""
    for label, base in (*(("$VISMT_DATA", root) for root in data_roots()), ("$VISMT_CACHE", cache_root())):
        if path.is_relative_to(base):
            return str(Path(label) / path.relative_to(base))
    return f"the {PACKAGES[path.name]} package" if path.name in PACKAGES else str(path)


def fix(card: Card) -> str:
    """Return the sentence of error messages that explains how to get the set."""
    if card.path.suffix not in CARDS:
        return f"Correct the files in {card.shown}, or describe them in a card."
    see = f"{card.shown}/{card.path.name}"
    handle = card.name if card.shown == f"datasets/{card.name}" else card.shown
    if card.downloadable:
        return f"`vismt data prepare {handle}` downloads it, or see {see}."
    return f"See {see} for how to get it."


def read_text(
    card: Card, path: Path, encoding: str, unpack: Callable[[bytes], bytes] = bytes, what: str = "file"
) -> str:
    """Return the text of a file without a byte-order mark. `unpack` is applied to its bytes.

    what: Name of the file in errors.
    """
    shown = shown_path(path)
    try:
        return unpack(regular_file(path).read_bytes()).decode(encoding).removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise UserError(f"{card.shown}: missing {what} '{shown}'. {fix(card)}") from error
    except (OSError, EOFError, UnicodeError) as error:
        raise UserError(f"{card.shown}: {what} '{shown}' cannot be read: {error}. {fix(card)}") from error


def verify_counts(
    card: Card, source: DataSource, base: Path, counts: Mapping[str, int], groups: Mapping[str, int] | None = None
) -> None:
    """Raise UserError if a split holds fewer or more examples than the card says.

    groups: Files found in each group of the manifest, such as `train/apple`. The error names groups that lack some.
    """
    split = next((name for name, count in counts.items() if source.splits[name] not in (None, count)), None)
    if split is None:
        return
    detail = ""
    if groups:
        whole = len(counts) == len(source.splits)
        short = [
            f"'{name}' has {groups.get(name, 0)} of {group.count}"
            for name, group in read_manifest(card, source).items()
            if groups.get(name, 0) < group.count and (whole or name.split("/")[0] in counts)
        ]
        detail = f"; {listed(short, 3)}" if short else ""
    raise UserError(
        f"{card.shown}: {counts[split]:,} of {source.splits[split]:,} {source.unit} found under {shown_path(base)}"
        f" (split '{split}'){detail}. {fix(card)}"
    )


def listed(texts: Sequence[str], limit: int) -> str:
    """Return the first `limit` texts with commas between them, and dots if there are more."""
    more = " ..." if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def verify_classes(card: Card, source: DataSource, base: Path, count: int) -> None:
    """Raise UserError if the copy does not hold as many classes as the card says."""
    wanted = source.classes or card.classes
    if wanted and count != wanted:
        raise UserError(f"{card.shown}: {count} of {wanted} classes found under {shown_path(base)}. {fix(card)}")


def verify_present(card: Card, base: Path, ids: Sequence[str], split: str) -> list[Path]:
    """Return the files that `ids`, relative to `base`, name. Raise UserError if one is missing."""
    paths = [base / name for name in ids]
    absent = [f"'{name}'" for name, path in zip(ids, paths, strict=True) if not path.is_file()]
    if absent:
        raise UserError(
            f"{card.shown}: {len(ids) - len(absent):,} of {len(ids):,} images of split '{split}' found under {shown_path(base)};"
            f" missing {listed(absent, 1)}. {fix(card)}"
        )
    return paths


def not_found(card: Card, split: str) -> UserError:
    """Return the error for a set without a source on this machine, or without one that has the split."""
    for source in card.sources:
        folder = find_copy(card, source)
        if folder is not None and split not in source.splits:
            counts = [count for count in source.splits.values() if count is not None]
            total = f" of {card.images:,}" if card.images else ""
            count = f"{sum(counts):,}{total} {source.unit} found under {shown_path(folder)}"
            return UserError(f"{card.shown}: {count}; missing split file '{split}'. {fix(card)}")
    packages = [PACKAGES[source.package] for source in card.sources if source.package]
    if packages:
        return UserError(f'{card.shown}: needs {packages[0]}, which is not installed: pip install "vismt[quickstart]".')
    folders = [shown_path(folder) for source in card.sources for folder in source.candidates(card)]
    unset = "" if data_roots() else " (VISMT_DATA is not set)"
    problem = f"{card.shown}: nothing found under {' or '.join(folders) or 'any folder'}{unset}."
    steps = " ".join(card.how_to_get.split())
    if steps and not card.downloadable:
        return UserError(f"{problem} How to get it: {steps}")
    return UserError(f"{problem} {fix(card)}")


@dataclass(frozen=True)
class FileGroup:
    """Number of files, and sha256 over their sorted `name, tab, sha256 of the bytes, newline` lines."""

    count: int
    sha256: str


def digest_files(files: Iterable[tuple[str, Path]]) -> FileGroup:
    """Return the FileGroup of (name, path) pairs, independent of their order."""
    total, ordered = hashlib.sha256(), sorted(files)
    check_names(name for name, _ in ordered)
    for name, path in ordered:
        total.update(f"{name}\t{hashlib.sha256(read_image_bytes(path)).hexdigest()}\n".encode())
    return FileGroup(len(ordered), total.hexdigest())


def read_manifest(card: Card, source: DataSource) -> dict[str, FileGroup]:
    """Return the groups that the card recorded for `source`. If it recorded nothing, there are none."""
    if source.manifest is None:
        return {}
    raw = card.read_json(source.manifest)
    try:
        return {str(group): FileGroup(int(count), str(sha256)) for group, (count, sha256) in raw.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{card.shown}/{source.manifest}: must map a group to [count, sha256].") from error


def write_manifest(path: Path, files: Files) -> None:
    """Record every group of `files` in the JSON file `path`, one line for each group."""
    groups = {name: digest_files(files[name]) for name in sorted(files)}
    lines = [f" {json.dumps(name)}: {json.dumps([group.count, group.sha256])}" for name, group in groups.items()]
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")
