"""Read cards (datasets/<name>/card.yaml, or a file of the user). source_types.py has their format."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vismt.base.errors import UserError, near, shown_value
from vismt.config.typed import build
from vismt.config.yaml_text import read_yaml
from vismt.data.formats.plain_sets import plain_card
from vismt.data.set_entries import CARDS, FILES
from vismt.data.source_types import DATA_KINDS, Card, DataSource
from vismt.storage.paths import list_cards, shipped

__all__ = ["Card", "list_cards", "load_card"]

CARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def load_card(name_or_path: str | Path) -> Card:
    """Return a card.

    Args:
        name_or_path: Name of a card that comes with the package, a card's file or folder, or a set without a card (see
            plain_sets.py).

    Raises:
        UserError: If the name is unknown (with similar names), a key is unknown or missing, a value has a wrong type, values do
            not go together, or a path leaves its folder. The message has the card's path and key.
    """
    path, shown = _locate(name_or_path)
    if path.suffix not in CARDS:
        card = plain_card(Path(shown))
        if card is not None:
            return card
        raise UserError(
            f"data '{name_or_path}': neither card.yaml nor class folders in it; give a folder with a folder of images for each "
            "class, or a .csv file with the columns path and label."
        )
    where = f"{shown}/{path.name}"
    raw = read_yaml(path, where)
    entries = raw.pop("sources", None)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: 'sources' must be a list with at least one entry (kinds: {', '.join(DATA_KINDS)}).")
    sources = [_read_source(entry, where, f"sources[{index}]") for index, entry in enumerate(entries)]
    card = build(Card, raw, where, sources=sources, path=path, shown=shown)
    if not CARD_NAME.fullmatch(card.name):
        raise UserError(
            f"{where}: name '{card.name}' must begin with a letter or digit of ASCII, and may hold only these, '_', '-' and '.'."
        )
    given = [key for key in ("groups", "frames") if getattr(card, key) is not None]
    if given and all(source.unit == "rows" for source in sources):
        raise UserError(f"{where}: '{given[0]}' is for images; leave it out.")
    if len(given) > 1:
        raise UserError(f"{where}: 'groups' and 'frames' both say which images belong together; leave one out.")
    return card


def _locate(name: str | Path) -> tuple[Path, str]:
    """Return the card's file and how messages name its folder."""
    text = str(name)
    # os.path answers where Path raises: for names that are too long, and for folders that cannot be entered.
    in_package = shipped("datasets") / text / "card.yaml"
    if CARD_NAME.fullmatch(text) and os.path.isfile(in_package):
        return in_package, f"datasets/{text}"
    path = Path(name).expanduser()
    if os.path.isfile(path / "card.yaml"):
        path = path / "card.yaml"
    if os.path.isfile(path) and path.suffix in CARDS:
        return path.resolve(), str(path.parent)
    if os.path.isdir(path) or (os.path.isfile(path) and path.suffix in FILES):
        return path.resolve(), str(path)
    if path.name != text and not os.path.exists(path):
        raise UserError(f"data '{text}': no such file or folder.")
    if os.path.isfile(path):
        raise UserError(f"data '{text}': this is not a {', '.join(FILES)} file; write its rows into one.")
    raise UserError(
        f"data '{text}': no card of that name and no card, folder or table at that path.{near(text, list_cards())}"
    )


def _read_source(entry: object, where: str, key: str) -> DataSource:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {key} is {shown_value(entry)}, not a section.")
    values = dict(entry)
    kind = values.pop("kind", None)
    if kind not in DATA_KINDS:
        raise UserError(f"{where}: {key}: kind {shown_value(kind)} is not known.{near(str(kind), DATA_KINDS)}")
    source = build(DATA_KINDS[kind], values, where, key)
    source.check(f"{where}: {key}")
    return source
