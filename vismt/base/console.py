"""Terminal output: one aligned line per stage and progress bars, which become plain lines outside a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vismt.base.errors import UserError

T = TypeVar("T")

_console = Console(highlight=False, soft_wrap=True, emoji=False)
_quiet = False
LINE_SECONDS = 20.0  # between the lines of a bar outside a terminal


def set_quiet(quiet: bool) -> None:
    """Turn stage lines and bars off or on; errors are printed either way. Ranks other than the first are quiet."""
    global _quiet
    _quiet = quiet


@contextmanager
def quiet() -> Iterator[None]:
    """Hide stage lines and bars while the body runs."""
    before = _quiet
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


def stage(name: str, text: str) -> None:
    """Print `name`, padded to eight characters, then `text`."""
    block(f"{name:<8}{text}")


def block(text: str) -> None:
    """Print a text of several lines without a stage name."""
    if not _quiet:
        _console.print(printable(text, _console.encoding), markup=False)


def printable(text: str, encoding: str = "utf8") -> str:
    """Return text with question marks for what an encoding lacks; UTF-8 lacks bytes that names of files can hold."""
    return text.encode(encoding, "replace").decode(encoding)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print the text of `aligned`."""
    block(aligned(columns, rows))


def aligned(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return aligned columns under a header; None is shown as '-', booleans as yes and no, integers with separators."""
    cells = [tuple(columns), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def ask(question: str) -> bool:
    """Return whether the user answers yes. Raises UserError without a terminal."""
    try:
        return input(printable(f"{question} [y/N] ", _console.encoding)).strip().lower() in ("y", "yes")
    except EOFError as error:
        raise UserError(f"{question} It needs a terminal for the answer; give --yes.") from error


def error(text: str) -> None:
    """Print one `error:` line to stderr."""
    line = "".join(character if character.isprintable() else " " for character in text)
    print(f"error: {line}", file=sys.stderr, flush=True)


class Bar:
    """Handle of a progress bar, or without a terminal of a line every LINE_SECONDS, so that short work prints none."""

    def __init__(self, progress: Progress | None, task: TaskID, line: Callable[[int], None], done: int) -> None:
        self._progress = progress
        self._task = task
        self._line = line
        self._done = done
        self._printed = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress.advance(self._task, steps)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self._line(self._done)

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def bar(name: str, text: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a progress bar for stage `name` while the body runs; outside a terminal print a line from time to time.

    The body advances the bar from `done`, the steps finished earlier, to `total`.
    """
    if _quiet or not _console.is_terminal:
        yield Bar(None, TaskID(0), lambda at: stage(name, f"{text} ({at}/{total})"), done)
        return
    columns = (
        TextColumn(f"{name:<7}"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console) as progress:
        yield Bar(progress, progress.add_task(text, total=total, completed=done, note=""), lambda at: None, done)


def track(items: Iterable[T], name: str, text: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a bar; `total` is required when `items` has no length."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with bar(name, text, total) as progress_bar:
        for item in items:
            yield item
            progress_bar.advance()
