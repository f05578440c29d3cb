"""The door to sets of texts: `open_texts` finds a card's copy and returns a `TextSet`."""

from __future__ import annotations

from pathlib import Path

from vismt.data.cards import Card, load_card
from vismt.data.formats.python_sets import python_object, texts_of
from vismt.data.names import row_name
from vismt.data.sources import first_copy, not_found, sources_for
from vismt.data.texts.text_set import TextSet, TextSource

__all__ = ["TextSet", "open_texts"]


def open_texts(card: Card | str | Path, split: str = "all", *, root: Path | None = None) -> TextSet:
    """Return the rows of `split`, from the first of the card's sources that is on this machine and has that split.

    Args:
        card: a card, its name, its file or its folder; a csv or jsonl file; the name of a Python object.
        split: name of a split, or "all" for every split.
        root: folder of the set itself, instead of a search in VISMT_DATA and the cache.

    Raises:
        UserError: an unknown card or split, a card without texts, a set that is not on this machine, rows that the card does
            not describe, and another number of rows than the card says.
    """
    given = None if isinstance(card, Card) else python_object(str(card), split)
    if given is not None:
        title = row_name(str(card))
        rows, content = texts_of(given, title)
        return TextSet(title, split, rows, [f"{split}:{number}" for number in range(len(rows))], lambda: content)
    card = card if isinstance(card, Card) else load_card(card)
    copy = first_copy(card, sources_for(card, TextSource, split), root)
    if copy is None:
        raise not_found(card, split, root)
    source, base = copy
    return source.load(card, base, split)
