"""The exception for user errors, and the hint of similar names for error texts."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SHOWN = 200  # number of characters of a value in an error
# What to do without a public name, a configuration key or a method that is gone. The error keeps an entry for one release.
GONE = {
    "pcgrad": 'Give torchjd:PCGrad (pip install "vismt[torchjd]"). With two tasks it has the same gradient.',
    "vismt.adapters_per_sample": "Run each adapter's samples after vismt.activate, or serve what export_peft writes.",
    "vismt.llm.read_slices": "Load each adapter by name, with vismt.load_adapter(model, folder, name=...).",
    "vismt.robustness.check_masking": "Attack with `strong` or `autoattack`, and compare the accuracy with `pgd`.",
    "vismt.robustness.quantise": "Quantise with a library such as torchao, and give the model as classifier.function.",
    "evaluate.masking": "Leave it out, and add the attack `strong`.",
    "evaluate.masking_episodes": "Leave it out, and add the attack `strong`.",
    "evaluate.neighbours": "Leave it out.",
    "classifier.quantise": "Leave it out. A classifier.function may return a quantised model.",
    "vismt.llm.switch": "Load each adapter by name, and switch with vismt.activate(model, name).",
}
QUOTED = re.compile(r"(?<!\w)'([^']*)'(?!\w)")


class UserError(ValueError):
    """An error that the user can fix. The message names the thing, what was seen and the fix.

    The command line prints it as one line and exits with code 2. Quoted names in the message are cut like values.
    """

    elsewhere = False  # whether another process had the error and prints it (ranks.py)

    def __init__(self, message: object = "") -> None:
        super().__init__(QUOTED.sub(lambda quoted: f"'{_cut(quoted[1])}'", str(message)))


class Diverged(UserError):
    """A training without a result: a loss or gradient is not finite, or the answer is the same for every example."""


class WeightsUnavailable(UserError):
    """Weights that no source delivers now: the network cannot be reached, or access is not granted."""


def shown_value(value: object) -> str:
    """Return a value as messages show it: `repr` on one line, cut after 200 characters."""
    if isinstance(value, str):
        return repr(_cut(value))
    text = repr(value)
    return _cut(" ".join(text.split()) if "\n" in text else text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def require_known(prefix: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first unknown name. The text has `prefix` ("adapt: no method"), the name and similar names."""
    choices = list(known)
    for name in names:
        if name not in choices:
            hint = near(str(name), choices) if choices else " It has none."
            raise UserError(f"{prefix} {shown_value(str(name))}.{hint}")


def named_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that raises a UserError with similar names for an argument that it does not have."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            hint = near(unknown, known) or f" Known: {', '.join(known)}."
            raise UserError(f"{function.__name__}: no argument '{unknown}'.{hint}")
        return function(*args, **kwargs)

    return checked


def need_whole(what: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return `value`. Raise UserError, which begins with `what`, unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f", at least {least}" if most is None else f" from {least} to {most:,}"
        raise UserError(f"{what} {shown_value(value)}; it must be a whole number{limits}.")
    return value


def need_names(what: str, value: object, also: type = str) -> list[Any]:
    """Return a name, or a list of names, as a list. Raise UserError, which begins with `what`, for anything else.

    also: Class whose objects are accepted beside names.
    """
    items = [value] if isinstance(value, (str, also)) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, (str, also)) for item in items):
        others = "" if also is str else f", or of {also.__name__}s"
        raise UserError(f"{what} {shown_value(value)}; give a name or a list of names{others}.")
    return list(items)


def near(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Return a hint for an unknown name, to append to an error text: " Near: 'a', 'b'." with up to `limit` similar choices.

    If no choice is close, the hint is " Known: ..." with all choices if there are at most 12, and empty otherwise.
    """
    allowed = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name[:SHOWN], allowed, n=limit, cutoff=0.5)
    close = close or [choice for choice in allowed if choice == _initials(name) or _initials(choice) == name]
    if close:
        return " Near: " + ", ".join(repr(choice) for choice in close) + "."
    if allowed and len(allowed) <= 12:
        return " Known: " + ", ".join(repr(choice) for choice in sorted(allowed)) + "."
    return ""


def _initials(name: str) -> str:
    """Return "lr" for "learning_rate", and "" for one word."""
    words = name.rpartition(".")[2].split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
