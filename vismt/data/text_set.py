"""What a reader of texts hands back: the rows of one split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vismt.data.cards import Card
from vismt.data.sources import fix, shown_path
from vismt.errors import UserError


@dataclass
class TextSet:
    """One split. rows: fields by name, texts or what the JSON holds; ids: "split:number" in the file's order.

    `content()` tells the rows from any others; `where` says where the copy lies.
    """

    name: str
    split: str
    rows: list[dict[str, Any]]
    ids: list[str]
    content: Callable[[], str]
    where: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int]) -> TextSet:
        """The rows `chosen` as a set of their own."""
        kept = [int(i) for i in chosen]
        told = hashlib.sha256(repr(kept).encode()).hexdigest()
        return replace(
            self,
            rows=[self.rows[i] for i in kept],
            ids=[self.ids[i] for i in kept],
            content=lambda: f"{self.content()}:{told}",
        )


def read_text(card: Card, path: Path, encoding: str, opened: Callable[[bytes], bytes] = bytes) -> str:
    """The text of a file without a byte-order mark; opened: what unpacks its bytes. UserError where it cannot be read."""
    shown = shown_path(path)
    try:
        return opened(path.read_bytes()).decode(encoding).removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise UserError(f"{card.shown}: missing file '{shown}'. {fix(card)}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{card.shown}: '{shown}' cannot be read: {error}. {fix(card)}") from error
