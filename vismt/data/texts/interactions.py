"""Histories of items and what came next, and candidates to choose the next item from.

Candidates are a function of the row's name and a seed: the same for every model, epoch and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.data.texts.text_set import TextSet


@dataclass(frozen=True)
class Catalogue:
    """The items of a set in the order of their file.

    ids: Ids as in the files. titles: Titles as people know them.
    """

    ids: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Catalogue of {len(self):,} items"


@dataclass
class InteractionSet(TextSet):
    """One split.

    rows: Rows {"user": a name, "history": numbers of items, the oldest first, "next": number, "catalogue": the items}.
    """

    @property
    def catalogue(self) -> Catalogue:
        """The items that the rows name by number."""
        return self.rows[0]["catalogue"] if self.rows else Catalogue()

    @property
    def users(self) -> list[int]:
        """Number of each row's user, in the order in which the users come."""
        return numbered([row["user"] for row in self.rows])


def numbered(names: Sequence[str]) -> list[int]:
    """Return the number of each name, in the order in which the names first come."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def draw_candidates(
    catalogue: Catalogue, history: Sequence[int], target: int, count: int, name: str, seed: int = 0
) -> list[int]:
    """Return `count` items of different titles in random order: the target once, and no item of the history.

    The result is a function of the row's `name`, which tells users apart, and the seed.
    """

    def title(number: int) -> str:
        return " ".join(catalogue.titles[number].casefold().split())

    taken = {title(number) for number in (*history, target)}
    if count < 2 or count > len(catalogue) - len(taken):
        raise UserError(
            f"candidates: {count} of {len(catalogue):,} items for row '{name}', whose history has {len(taken) - 1}; "
            "take 2 or more, and fewer than are left."
        )
    items = [target]
    turn = 0
    while len(items) < count:
        if turn > 1000 * count:
            raise UserError(
                f"candidates: fewer than {count} titles that differ are left for row '{name}'; lower the number."
            )
        drawn = mix_seed(seed, "candidate", name, turn) % len(catalogue)
        turn += 1
        if title(drawn) not in taken:
            taken.add(title(drawn))
            items.append(drawn)
    return [items[i] for i in sorted(range(count), key=lambda place: mix_seed(seed, "place", name, place))]
