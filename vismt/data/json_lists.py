"""The lists of cross-domain few-shot learning: `base.json`, `val.json`, `novel.json` name images and their labels.

Chen et al., arXiv 1904.04232, and Tseng et al., arXiv 2001.08735, write them: `label_names` (all classes), `image_names`
and `image_labels` (indices into label_names). The names are usually absolute paths of the machine that wrote the list.
"""

from __future__ import annotations

import json
from pathlib import Path

from vismt.data.cards import Card
from vismt.data.decode import decode_file
from vismt.data.manifest import digest
from vismt.data.source_types import FilelistSource
from vismt.data.sources import Loaded, fix, shown_path, verify_classes, verify_counts, verify_present
from vismt.data.typed_yaml import inside
from vismt.errors import UserError

KEYS = ("label_names", "image_names", "image_labels")
List = tuple[list[str], list[str], list[int]]  # label names, image names, image labels


def files(source: FilelistSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The lists, each the group of its own name."""
    names = [f"{split}.json" for split in source.splits]
    return {name: [(name, base / name)] if (base / name).is_file() else [] for name in names}


def read_list(card: Card, base: Path, split: str) -> List:
    """The three lists of one split; UserError when the file is missing, has another shape or labels without a name."""
    path = base / f"{split}.json"
    shown = shown_path(path)
    if not path.is_file():
        raise UserError(f"{card.shown}: missing list '{shown}' of split '{split}'. {fix(card)}")
    try:
        raw = json.loads(path.read_text(encoding="utf8"))
        names, images, labels = (
            [str(x) for x in raw[KEYS[0]]],
            [str(x) for x in raw[KEYS[1]]],
            [int(x) for x in raw[KEYS[2]]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown}: must be JSON with the lists {', '.join(KEYS)} ({error!r}). {fix(card)}") from error
    if len(images) != len(labels) or len(set(names)) != len(names):
        raise UserError(
            f"{shown}: {len(images)} images, {len(labels)} labels; there must be as many, and no class twice."
        )
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise UserError(f"{shown}: labels run from {min(labels)} to {max(labels)}, but label_names has {len(names)}.")
    return names, images, labels


def local_name(name: str, after: str | None, shown: str) -> str:
    """`name` relative to the folder of the set: of an absolute path, what follows `after`. UserError when it leads outside."""
    absolute = name.startswith("/")
    if absolute and after and f"/{after}" in name:
        name = name.partition(f"/{after}")[2]
    elif absolute:
        hint = f"; of an absolute path, what follows '{after}' counts" if after else ""
        raise UserError(
            f"{shown}: '{name}' lies outside the folder of the set{hint}. Write names relative to that folder."
        )
    return inside(name, shown)


def _check_split(card: Card, source: FilelistSource, base: Path, split: str, found: int) -> None:
    wanted = source.classes_per_split.get(split)
    if wanted is not None and found != wanted:
        raise UserError(
            f"{card.shown}: split '{split}' has {found} of {wanted} classes under {shown_path(base)}. {fix(card)}"
        )


def load(card: Card, source: FilelistSource, base: Path, split: str) -> Loaded:
    """The images of `split`; classes are the label_names of all lists, so a label means the same in each split.

    Raises UserError as read_list does, for a name that leads outside the folder, a missing image and wrong counts.
    """
    wanted = list(source.splits) if split == "all" else [split]
    here = [name for name in source.splits if name in wanted or (base / f"{name}.json").is_file()]
    lists = {name: read_list(card, base, name) for name in here}
    index: dict[str, int] = {}
    for names, _, _ in lists.values():
        for title in names:
            index.setdefault(title, len(index))
    verify_classes(card, source, base, len(index))
    ids: list[str] = []
    labels: list[int] = []
    for name in wanted:
        names, images, numbers = lists[name]
        shown = shown_path(base / f"{name}.json")
        ids += [local_name(image, source.after, shown) for image in images]
        labels += [index[names[number]] for number in numbers]
        _check_split(card, source, base, name, len(set(numbers)))
    paths = verify_present(card, base, ids, split)
    verify_counts(card, source, base, {name: len(lists[name][1]) for name in wanted}, {})
    return Loaded(
        list(index), labels, ids, lambda i: decode_file(paths[i]), lambda: f"{digest(zip(ids, paths)).sha256}:{labels}"
    )
