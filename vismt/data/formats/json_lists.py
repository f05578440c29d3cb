"""The lists of cross-domain few-shot learning: `base.json`, `val.json`, `novel.json` with images and their labels.

Chen et al., arXiv 1904.04232, and Tseng et al., arXiv 2001.08735, use this format: `label_names` (all classes),
`image_names` and `image_labels` (indices into label_names). The image names are usually absolute paths of the machine that
wrote the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.typed import relative_path, within
from vismt.data.copies import fix, read_text, shown_path
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import MOST_CLASSES, Card, Files, RootedSource, file_groups, source_kind
from vismt.storage.files import parse_json

KEYS = ("label_names", "image_names", "image_labels")
ImageList = tuple[list[str], list[str], list[int]]  # label names, image names, image labels


@source_kind("filelist")
@dataclass(frozen=True, kw_only=True)
class FilelistSource(RootedSource, ImageSource):
    """A file `<split>.json` with the lists label_names, image_names and image_labels.

    Attributes:
        classes_per_split: Number of classes that a split has images of.
        after: Text in an absolute image name. What follows it is the name relative to `root`.
    """

    classes_per_split: dict[str, Annotated[int, within(0, MOST_CLASSES)]]
    after: str | None = None

    def check(self, where: str) -> None:
        super().check(where)
        require_known(f"{where}: no split", self.classes_per_split, self.splits)

    def list_files(self, base: Path) -> Files:
        return file_groups(base, [f"{split}.json" for split in self.splits])

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images of the lists. Classes are the label_names of all existing lists."""
        present = [name for name in self.splits if name in splits or (base / f"{name}.json").is_file()]
        lists = {name: _read_list(card, base, name) for name in present}
        titles = dict.fromkeys(title for names, _, _ in lists.values() for title in names)
        number = {title: label for label, title in enumerate(titles)}
        rows: dict[str, list[ImageRow]] = {}
        for split in splits:
            names, images, labels = lists[split]
            count, wanted = len(set(labels)), self.classes_per_split.get(split)
            if wanted is not None and count != wanted:
                raise UserError(
                    f"{card.shown}: split '{split}' has {count} of {wanted} classes under {shown_path(base)}. {fix(card)}"
                )
            shown = shown_path(base / f"{split}.json")
            rows[split] = [
                ImageRow(local_name(image, self.after, shown), number[names[label]])
                for image, label in zip(images, labels, strict=True)
            ]
        return Listing(list(titles), rows)


def _read_list(card: Card, base: Path, split: str) -> ImageList:
    """Return the lists of one split. Raise UserError if the file is missing, has another shape or labels without a name."""
    path = base / f"{split}.json"
    shown = shown_path(path)
    text = read_text(card, path, "utf8", what="list")
    try:
        raw = parse_json(text)
        names = [str(name) for name in raw["label_names"]]
        images = [str(name) for name in raw["image_names"]]
        labels = list(raw["image_labels"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{shown}: must be JSON with the lists {', '.join(KEYS)} ({shown_value(error)}). {fix(card)}"
        ) from error
    wrong = [label for label in labels if type(label) is not int]
    if wrong:
        raise UserError(
            f"{shown}: label {shown_value(wrong[0])}; a label must be a whole number, the place of its class in label_names."
        )
    if len(images) != len(labels) or len(set(names)) != len(names):
        raise UserError(
            f"{shown}: {len(images)} images, {len(labels)} labels; there must be as many, and no class twice."
        )
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise UserError(f"{shown}: labels run from {min(labels)} to {max(labels)}, but label_names has {len(names)}.")
    return names, images, labels


def local_name(name: str, after: str | None, shown: str) -> str:
    """Return `name` relative to the folder of the set: for an absolute path, the text that follows `after`.

    Raise UserError for a name outside of the folder.
    """
    absolute = name.startswith("/")
    if absolute and after and f"/{after}" in name:
        name = name.partition(f"/{after}")[2]
    elif absolute:
        hint = f"; of an absolute path, what follows '{after}' counts" if after else ""
        raise UserError(
            f"{shown}: '{name}' is outside the folder of the set{hint}. Write names relative to that folder."
        )
    return relative_path(name, shown)
