"""Images listed by id in text files, as Wah et al., CNS-TR-2011-001, publish the birds: path, class and split of every id.

Each line holds an id, white space and one value: `12 002.Laysan_Albatross/0003.jpg`, `12 2`, `12 0`, and for the classes
`2 002.Laysan_Albatross`.
"""

from __future__ import annotations

from pathlib import Path

from vismt.data.cards import Card
from vismt.data.decode import decode_file
from vismt.data.manifest import digest
from vismt.data.source_types import LabelListSource
from vismt.data.sources import Loaded, fix, shown_path, verify_classes, verify_counts, verify_present
from vismt.data.typed_yaml import inside
from vismt.errors import UserError

SPLIT_OF = {"1": "train", "0": "test"}


def files(source: LabelListSource, base: Path) -> dict[str, list[tuple[str, Path]]]:
    """The four lists, each the group of its own name."""
    names = (source.paths, source.labels, source.training, source.names)
    return {name: [(name, base / name)] if (base / name).is_file() else [] for name in names}


def read_list(card: Card, path: Path) -> dict[str, str]:
    """{id: value} in the order of the lines; UserError for a missing file, a line without a value and an id given twice."""
    shown = shown_path(path)
    if not path.is_file():
        raise UserError(f"{card.shown}: missing list '{shown}'. {fix(card)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{card.shown}: list '{shown}' cannot be read: {error}. {fix(card)}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, *value = line.split(maxsplit=1)
        if not value:
            raise UserError(f"{shown}: line {number}: '{line.strip()}' must be an id, a space and a value. {fix(card)}")
        if key in found:
            raise UserError(f"{shown}: line {number}: id '{key}' is given twice. {fix(card)}")
        found[key] = value[0].rstrip()
    return found


def _same_ids(card: Card, first: tuple[Path, dict[str, str]], other: tuple[Path, dict[str, str]]) -> None:
    for (here, ids), (there, known) in ((first, other), (other, first)):
        lacking = [key for key in ids if key not in known]
        if lacking:
            raise UserError(
                f"{card.shown}: {len(lacking):,} of the {len(ids):,} ids of '{shown_path(here)}' are not in '{there.name}',"
                f" the first is '{lacking[0]}'. {fix(card)}"
            )


def _known_values(card: Card, path: Path, values: dict[str, str], known: dict[str, str], what: str) -> None:
    strange = next((key for key, value in values.items() if value not in known), None)
    if strange is not None:
        raise UserError(f"{shown_path(path)}: id '{strange}' has '{values[strange]}', which is {what}. {fix(card)}")


def load(card: Card, source: LabelListSource, base: Path, split: str) -> Loaded:
    """The images of `split` ('all' = every split) in the order of the list of paths; ids are paths relative to `base`.

    Raises UserError as read_list does, for ids that are not in every list, an unknown class, a mark that is neither 1 nor
    0, a path that leaves the folder, a missing image and wrong counts.
    """
    places = [base / name for name in (source.paths, source.labels, source.training, source.names)]
    paths, labels, training, names = (read_list(card, place) for place in places)
    for place, content in zip(places[1:3], (labels, training), strict=True):
        _same_ids(card, (places[0], paths), (place, content))
    _known_values(card, places[1], labels, names, f"no class of '{source.names}'")
    _known_values(card, places[2], training, SPLIT_OF, "neither 1 (train) nor 0 (test)")
    verify_classes(card, source, base, len(names))
    wanted = list(source.splits) if split == "all" else [split]
    chosen = {name: [key for key in paths if SPLIT_OF[training[key]] == name] for name in wanted}
    verify_counts(card, source, base, {name: len(keys) for name, keys in chosen.items()}, {})
    keys = [key for name in wanted for key in chosen[name]]
    shown = shown_path(places[0])
    ids = [f"{source.folder}/{inside(paths[key], shown)}" for key in keys]
    images = verify_present(card, base, ids, split)
    number = {key: label for label, key in enumerate(names)}
    targets = [number[labels[key]] for key in keys]
    return Loaded(
        classes=list(names.values()),
        labels=targets,
        ids=ids,
        read=lambda i: decode_file(images[i]),
        content=lambda: f"{digest(zip(ids, images)).sha256}:{targets}",
    )
