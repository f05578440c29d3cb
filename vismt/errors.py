"""The one error that a user can cause, and the near-name hint that every message uses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message names the thing, what was seen and the fix.

    The command line prints it as one line and exits with code 2.
    """


def require_known(told: str, names: Iterable[str], known: Iterable[str]) -> None:
    """UserError for the first of `names` that is not `known`: `told`, the name, and the near ones."""
    choices = list(known)
    for name in names:
        if name not in choices:
            raise UserError(f"{told} {str(name)!r}.{near(str(name), choices) if choices else ' It has none.'}")


def near(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """ " Near: 'a', 'b'." for the choices closest to `name`, or the whole short list when none is close."""
    known = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return " Near: " + ", ".join(repr(choice) for choice in close) + "."
    if known and len(known) <= 12:
        return " Known: " + ", ".join(repr(choice) for choice in sorted(known)) + "."
    return ""
