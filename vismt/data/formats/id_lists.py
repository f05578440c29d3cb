"""Images listed by id in text files, as Wah et al., CNS-TR-2011-001, publish CUB-200: path, class and split of every id.

Each line holds an id, white space and one value: `12 002.Laysan_Albatross/0003.jpg`, `12 2`, `12 0`, and for the classes
`2 002.Laysan_Albatross`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vismt.base.errors import UserError, require_known
from vismt.config.typed import RelativePath, relative_path
from vismt.data.copies import fix, read_text, shown_path
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.source_types import Card, Files, RootedSource, file_groups, source_kind

SPLIT_OF = {"1": "train", "0": "test"}  # split by value of the list `training`


@source_kind("lists")
@dataclass(frozen=True, kw_only=True)
class LabelListSource(RootedSource, ImageSource):
    """Four text files with an id first on every line.

    Attributes:
        folder: Folder of the images.
        paths: File with image id and path below `folder`.
        labels: File with image id and class id.
        training: File with image id and 1 (train) or 0 (test).
        names: File with class id and class name, in the order of the classes.
    """

    folder: RelativePath
    paths: RelativePath
    labels: RelativePath
    training: RelativePath
    names: RelativePath

    def check(self, where: str) -> None:
        super().check(where)
        require_known(f"{where}: 'training' tells train from test; no split", self.splits, SPLIT_OF.values())

    def list_files(self, base: Path) -> Files:
        return file_groups(base, (self.paths, self.labels, self.training, self.names))

    def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
        """Return the images in the order of the list of paths. Ids are paths relative to `base`."""
        places = [base / name for name in (self.paths, self.labels, self.training, self.names)]
        paths, labels, training, names = (_read_list(card, place) for place in places)
        for place, content in zip(places[1:3], (labels, training), strict=True):
            _check_same_ids(card, (places[0], paths), (place, content))
        _check_values(card, places[1], labels, names, f"not a class of '{self.names}'")
        _check_values(card, places[2], training, SPLIT_OF, "neither 1 (train) nor 0 (test)")
        number = {key: label for label, key in enumerate(names)}
        rows: dict[str, list[ImageRow]] = {split: [] for split in splits}
        for key, path in paths.items():
            split = SPLIT_OF[training[key]]
            if split in rows:
                name = f"{self.folder}/{relative_path(path, shown_path(places[0]))}"
                rows[split].append(ImageRow(name, number[labels[key]]))
        return Listing(list(names.values()), rows)


def _read_list(card: Card, path: Path) -> dict[str, str]:
    """Return {id: value} in the order of the lines."""
    shown = shown_path(path)
    values: dict[str, str] = {}
    for number, line in enumerate(read_text(card, path, "utf8", what="list").splitlines(), start=1):
        if not line.strip():
            continue
        key, *value = line.split(maxsplit=1)
        if not value:
            raise UserError(f"{shown}: line {number}: '{line.strip()}' must be an id, a space and a value. {fix(card)}")
        if key in values:
            raise UserError(f"{shown}: line {number}: id '{key}' is given twice. {fix(card)}")
        values[key] = value[0].rstrip()
    return values


def _check_same_ids(card: Card, first: tuple[Path, dict[str, str]], second: tuple[Path, dict[str, str]]) -> None:
    for (path, ids), (other_path, other_ids) in ((first, second), (second, first)):
        missing = [key for key in ids if key not in other_ids]
        if missing:
            raise UserError(
                f"{card.shown}: {len(missing):,} of the {len(ids):,} ids of '{shown_path(path)}' are not in "
                f"'{other_path.name}', the first is '{missing[0]}'. {fix(card)}"
            )


def _check_values(card: Card, path: Path, values: Mapping[str, str], allowed: Mapping[str, str], problem: str) -> None:
    unknown = next((key for key, value in values.items() if value not in allowed), None)
    if unknown is not None:
        raise UserError(f"{shown_path(path)}: id '{unknown}' has '{values[unknown]}', which is {problem}. {fix(card)}")
